"""The ids of a job's events. Each says how much of the job the client has seen that has read its event and all before it.

So any API worker or machine that knows the job can go on from there, without a record of what was sent. Does not know HTTP.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from stable_diffusion.api.job import attempt_of, progress_of
from stable_diffusion.state.job_record import JobRecord

ENDED = "ended"  # the id of a job's last event
_FORM = re.compile(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})\.([0-9a-f]{8})?", re.ASCII)


@dataclass(frozen=True)
class EventId:
    """Seen of a job that has not ended. Of two ids of a job, the one with the larger attempt and step is the later one."""

    attempt: int
    step: int
    position: int
    preview: str  # identifies the last preview, "" if there was none

    def __str__(self) -> str:
        return f"{self.attempt}.{self.step}.{self.position}.{self.preview}"


def read_event_id(text: str | None) -> EventId | None:
    """What a client has seen whose last event had the id `text`. None, which is nothing, if this is no such id."""
    found = _FORM.fullmatch(text or "")
    return None if found is None else EventId(int(found[1]), int(found[2]), int(found[3]), found[4] or "")


def event_id_of(records: Sequence[JobRecord], preview: str) -> EventId:
    """The id of a job's progress. `preview`: identifies the last preview that was sent."""
    progress = progress_of(records)
    return EventId(attempt_of(records), progress.step, progress.position, preview)


def preview_id(png: bytes) -> str:
    return f"{zlib.crc32(png):08x}"
