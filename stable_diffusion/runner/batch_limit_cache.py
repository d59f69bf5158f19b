"""Caches measured batch limits in a file in the user's cache folder, because measuring delays a start by seconds.

A cached limit applies only if its key is equal. `startup.py` defines the key and measures.
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
_MAX_ENTRIES = 100
# Measure again after a week: the machine may have been busy at the last measurement.
_MAX_AGE_S = 7 * 86_400


def batch_limits_file() -> Path:
    """The file, in the place that the XDG base directory specification defines, or among temporary files if the user has no home."""
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / _NAME
    try:
        return Path.home() / ".cache" / _NAME
    except RuntimeError:
        return Path(tempfile.gettempdir()) / _NAME


def recall(key: dict[str, str | int]) -> BatchLimit | None:
    """The batch limit that was measured under the same conditions within the last week, if any."""
    for entry in _entries():
        if entry["key"] == key:
            logger.info("The batch limit was read from %s; remove that file to have it measured again.", batch_limits_file())
            measured = datetime.fromtimestamp(entry["measured_s"], timezone.utc)
            return BatchLimit(entry["jobs"], f"{entry['reason']}; measured on {measured:%Y-%m-%d}")
    return None


def keep(key: dict[str, str | int], batch_limit: BatchLimit) -> None:
    """Store a batch limit for the next start. A folder without write permission does not fail the start."""
    entry = {"key": key, "jobs": batch_limit.jobs, "reason": batch_limit.reason, "measured_s": time.time()}
    entries = [entry, *(other for other in _entries() if other["key"] != key)][:_MAX_ENTRIES]
    file = batch_limits_file()
    unfinished = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(entries, indent=1), encoding="utf-8")
        os.replace(unfinished, file)  # atomic, since another runner may be reading
    except OSError as error:
        logger.info("The measured batch limit cannot be stored for the next start: %s", error.strerror)
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _entries() -> list[dict[str, Any]]:
    """The recent, complete entries. An invalid file counts as empty and is overwritten."""
    try:
        entries = json.loads(batch_limits_file().read_text(encoding="utf-8"))
        return [entry for entry in entries if _is_complete(entry) and time.time() - entry["measured_s"] < _MAX_AGE_S]
    except (OSError, ValueError, TypeError):
        return []


def _is_complete(entry: Any) -> bool:
    types: dict[str, Any] = {"key": dict, "jobs": int, "reason": str, "measured_s": (int, float)}
    return isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in types.items())
