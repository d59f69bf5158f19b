"""The job store as the rest of the server sees it: who calls what, and what holds whichever store is behind it.

Does not know the stores: sqlite_jobs.py for one machine, redis_jobs.py for many. shared_state.py chooses.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from stable_diffusion.core.errors import ServiceError
from stable_diffusion.core.types import GeneratedImage, ImageFormat, Progress, Task, Ticket
from stable_diffusion.state.job_record import JobRecord

# Unfinished ones, for each machine; each holds one of the 800 connections that BentoML allows to the runner.
MAX_ASYNCHRONOUS_JOBS = 64
JOBS_REMEMBERED_S = 24 * 3600
HELD_FOR_S = 60  # after this silence the API worker that should hand the job to a runner is considered dead


def new_job_id() -> str:
    return secrets.token_hex(16)


class Jobs(Protocol):
    """The state of every job. Processes and threads may use it concurrently.

    Every call may wait for a disk or a network, at most some seconds: do not call it on an event loop. Every call raises JobsUnavailable
    if the store cannot be read or written, and the log gives the reason.
    """

    # --- the model process ---------------------------------------------------------------------------

    def register_runner(self, runner: int) -> None:
        """Called when the runner of this number starts. Fails the unfinished jobs of its predecessor."""

    def begin(self, ticket: Ticket, task: Task, runner: int) -> None:
        """Note that the runner has the job."""

    def note(self, notes: Mapping[Ticket, Progress]) -> None:
        """Store how far jobs are. An older preview stays if there is no newer one."""

    def end(self, ticket: Ticket, outcome: GeneratedImage | ServiceError) -> None:
        """Store how a job ended, with the image if the job is asynchronous. Deletes old jobs and images."""

    def to_cancel(self, runner: int) -> list[tuple[str, int]]:
        """The (id, index) of this runner's jobs whose cancellation was requested, or that another process has just given up."""

    # --- API workers ---------------------------------------------------------------------------------

    def accept(
        self,
        ticket: Ticket,
        tasks: Sequence[Task],
        idempotency_key: str | None,
        fingerprint: str,
        image_format: ImageFormat | None = None,
    ) -> str:
        """Accept an asynchronous job of one image for each task, which the caller must then hand to a runner. Returns its id.

        If this owner has used `idempotency_key` before, returns the id of that earlier job, and there is nothing to hand over.
        Raises IdempotencyMismatch if the key was used for another request, TooManyJobs if too many jobs are unfinished.
        """

    def get(self, job_id: str, owner: str | None = None) -> list[JobRecord]:
        """One record per image of the job. Raises UnknownJob, also if the job belongs to another owner than `owner`."""

    def cancel(self, job_id: str) -> None:
        """Request the cancellation of a job, if it is unfinished."""

    def note_held(self, job_id: str) -> None:
        """Note that the API worker which hands the job to a runner is alive and still waits for the runner."""

    def note_fetched(self, job_id: str) -> None:
        """Note that a client has fetched the job's image."""

    def is_to_be_fetched(self, job_id: str) -> bool:
        """Whether the job has an image that no client has fetched and that is lost when this server ends."""

    def of_owner(self, owner: str) -> list[JobRecord]:
        """The owner's unfinished jobs, the oldest first."""

    def cancel_of_owner(self, owner: str) -> None:
        """Request the cancellation of all unfinished jobs of an owner."""

    def abandon(self, job_id: str, error: ServiceError, attempt: int | None = None) -> None:
        """End the job with `error` if it has not ended. A runner that is generating it stops.

        With `attempt`: only images that are still in this attempt.
        """


@dataclass(frozen=True)
class Taken:
    """A job that this machine has taken from the queue that machines share: its images that are to be generated, each with its ticket."""

    job_id: str
    images: tuple[tuple[Task, Ticket], ...]


@dataclass(frozen=True)
class WaitingWork:
    """What waits in the queue that machines share: pixels times steps of its jobs, and how many model processes take from it."""

    pixel_steps: float
    runners: int


class JobQueue(Protocol):
    """The accepted jobs that no machine has yet. Callers take turns by the work of their jobs. Calls are like those of Jobs."""

    def take(self, most_images: int) -> Taken | None:
        """Take the next job, unless this machine already has so many unfinished images, or nothing waits."""

    def give_back(self, ticket: Ticket, *, is_redraw: bool) -> None:
        """Put an image back for any machine, if this attempt is still the last. `is_redraw`: its runner died; the third time it fails."""

    def waiting_work(self) -> WaitingWork:
        """What no machine has taken yet. A job of several images counts in full until all of them are taken."""
