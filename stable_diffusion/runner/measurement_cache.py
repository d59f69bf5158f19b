"""Caches what a start measures in a file in the user's cache folder: batch limits and ways of computing. Measuring takes seconds.

An entry applies only if its key is equal. `startup.py` defines the keys and measures. An entry also marks a way that is being tried: if
the process ends meanwhile, because it hangs or the device fails, the next start knows which way it was.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

from stable_diffusion.engine.calibration import BatchLimit

logger = logging.getLogger("stable_diffusion")

_NAME = Path("stable_diffusion_bentoml") / "caps.json"
_MAX_ENTRIES = 100
# Measure again after a week: the machine may have been busy at the last measurement.
_MAX_AGE_S = 7 * 86_400


def measurements_file() -> Path:
    """The file, in the place that the XDG base directory specification defines, or among temporary files if the user has no home."""
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / _NAME
    try:
        return Path.home() / ".cache" / _NAME
    except RuntimeError:
        return Path(tempfile.gettempdir()) / _NAME


Key = dict[str, str | int]


def recall(key: Key) -> BatchLimit | None:
    """The batch limit that was measured under the same conditions within the last week, if any."""
    entry = _entry_of(key | {"of": "batch limit"}, {"jobs": int, "reason": str})
    if entry is None:
        return None
    logger.info("The batch limit was read from %s; remove that file to have it measured again.", measurements_file())
    return BatchLimit(entry["jobs"], f"{entry['reason']}; {_measured_on(entry)}")


def keep(key: Key, batch_limit: BatchLimit) -> None:
    """Store a batch limit for the next start. A folder without write permission does not fail the start."""
    _store(key | {"of": "batch limit"}, {"jobs": batch_limit.jobs, "reason": batch_limit.reason})


def recall_way(key: Key) -> tuple[str, str] | None:
    """The name of the way of computing that was chosen under the same conditions within the last week, and why, if any."""
    entry = _entry_of(key | {"of": "way"}, {"name": str, "reason": str})
    return None if entry is None else (entry["name"], f"{entry['reason']}; {_measured_on(entry)}")


def keep_way(key: Key, name: str, reason: str) -> None:
    """Store the chosen way of computing for the next start."""
    _store(key | {"of": "way"}, {"name": name, "reason": reason})


@contextlib.contextmanager
def trying(key: Key, name: str) -> Iterator[None]:
    """Mark a way as being tried by this process. The mark stays if the process ends within the block."""
    mark = key | {"of": "try", "way": name}
    _store(mark, {"pid": os.getpid(), "created_s": psutil.Process().create_time()})
    yield
    _write([entry for entry in _entries() if entry["key"] != mark])


def has_ended_a_process(key: Key, name: str) -> bool:
    """Whether a process has ended while it tried this way. Another process may be trying it now."""
    entry = _entry_of(key | {"of": "try", "way": name}, {"pid": int, "created_s": (int, float)})
    if entry is None:
        return False
    try:
        return bool(psutil.Process(entry["pid"]).create_time() != entry["created_s"])
    except psutil.NoSuchProcess:
        return True


def _measured_on(entry: dict[str, Any]) -> str:
    return f"measured on {datetime.fromtimestamp(entry['measured_s'], timezone.utc):%Y-%m-%d}"


def _entry_of(key: Key, types: dict[str, Any]) -> dict[str, Any] | None:
    found = (entry for entry in _entries() if entry["key"] == key)
    return next((entry for entry in found if all(isinstance(entry.get(name), kind) for name, kind in types.items())), None)


def _store(key: Key, values: dict[str, str | int | float]) -> None:
    _write([{"key": key, **values, "measured_s": time.time()}, *(other for other in _entries() if other["key"] != key)][:_MAX_ENTRIES])


def _write(entries: list[dict[str, Any]]) -> None:
    file = measurements_file()
    unfinished = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(entries, indent=1), encoding="utf-8")
        os.replace(unfinished, file)  # atomic, since another runner may be reading
    except OSError as error:
        logger.info("What was measured cannot be stored for the next start: %s", error.strerror)
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _entries() -> list[dict[str, Any]]:
    """The recent, complete entries. An invalid file counts as empty and is overwritten."""
    try:
        entries = json.loads(measurements_file().read_text(encoding="utf-8"))
        return [entry for entry in entries if _is_complete(entry) and time.time() - entry["measured_s"] < _MAX_AGE_S]
    except (OSError, ValueError, TypeError):
        return []


def _is_complete(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("key"), dict) and isinstance(entry.get("measured_s"), int | float)
