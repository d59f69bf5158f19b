"""The measured caps of earlier starts, in a file of the user's cache folder: measuring delays a start by seconds.

Knows nothing of how a cap is measured or of what the values of a key mean: a cap counts for equal keys only.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from stable_diffusion.engine.calibration import Cap

logger = logging.getLogger("stable_diffusion")

_MOST_KEPT = 100


def caps_file() -> Path:
    """Where the XDG base directory specification wants it."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "stable_diffusion_bentoml" / "caps.json"


def recall(key: dict[str, str | int]) -> Cap | None:
    """The cap that was measured under the same conditions, if there is one."""
    for entry in _entries():
        if entry["key"] == key:
            return Cap(entry["cap"]["jobs"], f"{entry['cap']['reason']}; measured on {entry['date']}, kept in {caps_file()}")
    return None


def keep(key: dict[str, str | int], cap: Cap) -> None:
    """For the next start. A folder that cannot be written to is no reason not to start."""
    entry = {"key": key, "cap": asdict(cap), "date": datetime.now(timezone.utc).strftime("%Y-%m-%d")}
    entries = [entry, *(other for other in _entries() if other["key"] != key)][:_MOST_KEPT]
    file = caps_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, encoding="utf-8", delete=False) as written:
            json.dump(entries, written, indent=1)
        os.replace(written.name, file)  # another runner may be reading
    except OSError as error:
        logger.info("The measured cap cannot be kept for the next start: %s", error.strerror)


def _entries() -> list[dict[str, Any]]:
    try:
        entries = json.loads(caps_file().read_text(encoding="utf-8"))
        return [entry for entry in entries if isinstance(entry["cap"]["jobs"], int) and entry["cap"]["reason"] and entry["date"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []  # none yet, or not ours: it is written anew
