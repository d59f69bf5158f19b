"""The measured caps of earlier starts, in a file of the user's cache folder: measuring delays a start by seconds.

Knows nothing of how a cap is measured or of what the values of a key mean: a cap counts for equal keys only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from stable_diffusion.engine.calibration import BatchLimit

logger = logging.getLogger("stable_diffusion")


_NAME = Path("stable_diffusion_bentoml") / "caps.json"
_MOST_KEPT = 100
# A machine that was busy when it was measured is not slow for ever.
_KEPT_S = 7 * 86_400


def batch_limits_file() -> Path:
    """Where the XDG base directory specification wants it; a user without a home has none, and keeps it with temporary files."""
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / _NAME
    try:
        return Path.home() / ".cache" / _NAME
    except RuntimeError:
        return Path(tempfile.gettempdir()) / _NAME


def recall(key: dict[str, str | int]) -> BatchLimit | None:
    """The cap that was measured under the same conditions during the last days, if there is one."""
    for entry in _entries():
        if entry["key"] == key:
            logger.info("The cap is known from %s; remove that file to have it measured again.", batch_limits_file())
            measured = datetime.fromtimestamp(entry["measured_s"], timezone.utc)
            return BatchLimit(entry["jobs"], f"{entry['reason']}; measured on {measured:%Y-%m-%d}")
    return None


def keep(key: dict[str, str | int], batch_limit: BatchLimit) -> None:
    """For the next start. A folder that cannot be written to is no reason not to start."""
    entry = {"key": key, "jobs": batch_limit.jobs, "reason": batch_limit.reason, "measured_s": time.time()}
    entries = [entry, *(other for other in _entries() if other["key"] != key)][:_MOST_KEPT]
    file = batch_limits_file()
    unfinished = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(entries, indent=1), encoding="utf-8")
        os.replace(unfinished, file)  # another runner may be reading
    except OSError as error:
        logger.info("The measured cap cannot be kept for the next start: %s", error.strerror)
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _entries() -> list[dict[str, Any]]:
    """Those that are young and whole. A file that is not ours is taken for empty and written anew."""
    try:
        entries = json.loads(batch_limits_file().read_text(encoding="utf-8"))
        return [entry for entry in entries if _is_whole(entry) and time.time() - entry["measured_s"] < _KEPT_S]
    except (OSError, ValueError, TypeError):
        return []


def _is_whole(entry: Any) -> bool:
    types: dict[str, Any] = {"key": dict, "jobs": int, "reason": str, "measured_s": (int, float)}
    return isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in types.items())
