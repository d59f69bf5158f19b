"""A job as JSON, as /jobs and the response 202 describe it, built from the records of its images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, NonNegativeInt
from typing_extensions import NotRequired, TypedDict

from stable_diffusion.api.responses import Attempt, ErrorDetails, error_body
from stable_diffusion.api.times import Time, time_at
from stable_diffusion.core.types import Kind, Progress
from stable_diffusion.state.job_record import JobRecord, State


class Job(TypedDict):
    id: str
    state: State
    kind: Kind
    images: Annotated[int, Field(ge=1, description="Images of the job; `step` and `steps` count all of them.")]
    position: Annotated[
        NonNegativeInt | None,
        Field(description="Place among the jobs that wait for their first step, 0 for all others; null until known."),
    ]
    attempt: Attempt
    step: NonNegativeInt
    steps: NonNegativeInt
    seconds_left: Annotated[
        float | None, Field(ge=0, description="Estimated from measured steps, without further requests; null until known.")
    ]
    created_at: Time
    ended_at: Time | None
    picture: Annotated[str | None, Field(description="The path of the image; null if none is kept.")]
    picture_kept_until: Time | None
    error: NotRequired[ErrorDetails]


class CompletedJobEvent(TypedDict):
    """The event `completed` of a job whose image is not kept."""

    job: Job


def description(records: Sequence[JobRecord]) -> Job:
    """The job of these images. Its progress is that of all of them together."""
    progress, first = progress_of(records), records[0]
    ended = [record.ended_at for record in records if record.ended_at is not None]
    described: Job = {
        "id": first.id,
        "state": _state(records),
        "kind": first.task.kind,
        "images": len(records),
        "position": progress.position if is_estimated(records) else None,
        "attempt": attempt_of(records),
        "step": progress.step,
        "steps": progress.steps,
        "seconds_left": round(progress.seconds_left, 1) if is_estimated(records) else None,
        "created_at": time_at(first.created_at),
        "ended_at": time_at(max(ended)) if is_ended(records) else None,
        "picture": f"/jobs/{first.id}/picture" if first.image is not None else None,
        "picture_kept_until": None if first.kept_until is None else time_at(first.kept_until),
    }
    if (error := next((record.error for record in records if record.error is not None), None)) is not None:
        described["error"] = error_body(error.type, error.message, error.problems)["error"]
    return described


def is_ended(records: Sequence[JobRecord]) -> bool:
    return all(record.is_ended for record in records)


def is_estimated(records: Sequence[JobRecord]) -> bool:
    return all(record.is_estimated for record in records)


def attempt_of(records: Sequence[JobRecord]) -> int:
    """1, and one more for each time that one of the job's images was taken away from a machine: then the job's steps are fewer again."""
    return 1 + sum(record.attempt for record in records)


def progress_of(records: Sequence[JobRecord]) -> Progress:
    """The progress of all images together."""
    standings = [record.progress for record in records]
    waiting = [standing.position for standing in standings]
    return Progress(
        position=min(waiting) if _state(records) == "queued" else 0,
        step=sum(standing.step for standing in standings),
        steps=sum(standing.steps for standing in standings),
        seconds_left=max(standing.seconds_left for standing in standings),
    )


def _state(records: Sequence[JobRecord]) -> State:
    states = {record.state for record in records}
    if not is_ended(records):
        return "queued" if states == {"queued"} else "running"
    return next(state for state in ("failed", "cancelled", "completed") if state in states)
