"""The job store of many machines, in a Redis or Valkey. Each call is one script, by the store's clock.

Accepted jobs wait in a queue until a machine has room. A runner reports every few seconds; the jobs of one that falls silent go back into
the queue. Does not know how the store is reached.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from PIL import Image

from stable_diffusion.core.errors import (
    Cancelled,
    DeadlineExceeded,
    GenerationFailed,
    IdempotencyMismatch,
    ServiceError,
    SharedStateUnavailable,
    TooManyJobs,
    UnknownJob,
)
from stable_diffusion.core.types import GeneratedImage, ImageFormat, Progress, Task, Ticket
from stable_diffusion.state import redis_scripts as scripts
from stable_diffusion.state.job_record import JobRecord, as_png, described, from_png, key_digest, state_of_error, task_of
from stable_diffusion.state.jobs import Taken, WaitingWork
from stable_diffusion.state.shared_store import SharedStore

logger = logging.getLogger("stable_diffusion")

PREFIX = "stable_diffusion:{jobs}:"
KEPT_BYTES = 256 << 20  # of images, all machines together
_REPORT_S = 5.0
_CANCELLED = json.dumps(Cancelled("the job was cancelled").facts())
# Of jobs whose runner died, that were cancelled before, and whose time passed in the queue.
_OUTCOMES = (
    json.dumps(GenerationFailed("the model process stopped before the image was finished").facts()),
    _CANCELLED,
    json.dumps(DeadlineExceeded("the time that the request allows passed before a machine had room for the image").facts()),
)


class RedisJobs:
    """Implements state.jobs.Jobs and JobQueue for all machines that have the same store."""

    def __init__(self, store: SharedStore, machine: str, kept_bytes: int = KEPT_BYTES) -> None:
        """`machine`: identifies this server among those that share the store."""
        self._store = store
        self._machine = machine
        self._kept_bytes = kept_bytes
        self._process = secrets.token_hex(4)  # a runner that was started again is not its predecessor
        self._closed = threading.Event()

    def _run(self, script: str, *arguments: str | bytes | int | float) -> object:
        return self._store.run(script, [PREFIX], *arguments)

    def _name(self, runner: int) -> str:
        return f"{self._machine}/{runner}/{self._process}"

    def register_runner(self, runner: int) -> None:
        """Also reports from now on that this runner lives, from a thread of its own."""
        threading.Thread(target=self._report, args=(runner,), daemon=True, name="report to the shared state").start()
        self._run(scripts.REGISTER, self._name(runner), f"{self._machine}/{runner}/", *_OUTCOMES)

    def _report(self, runner: int) -> None:
        while not self._closed.wait(_REPORT_S):
            with suppress(SharedStateUnavailable):
                self.to_cancel(runner)

    def close(self) -> None:
        """Stop reporting."""
        self._closed.set()

    def begin(self, ticket: Ticket, task: Task, runner: int) -> None:
        self._run(
            scripts.BEGIN,
            ticket.job_id,
            ticket.index,
            ticket.owner,
            int(ticket.asynchronous),
            described(task),
            task.num_inference_steps,
            self._name(runner),
            ticket.attempt,
        )

    def note(self, notes: Mapping[Ticket, Progress]) -> None:
        arguments: list[str | bytes | int | float] = []
        for ticket, progress in notes.items():
            preview = b"" if progress.preview is None else as_png(progress.preview)
            state = "queued" if progress.position else "running"
            arguments += [
                ticket.job_id,
                ticket.index,
                state,
                progress.position,
                progress.step,
                progress.steps,
                progress.seconds_left,
                preview,
                ticket.attempt,
            ]
        self._run(scripts.NOTE, *arguments)

    def end(self, ticket: Ticket, outcome: GeneratedImage | ServiceError) -> None:
        state = "completed" if isinstance(outcome, GeneratedImage) else state_of_error(outcome)
        values = (ticket.job_id, ticket.index, state, json.dumps(outcome.facts()), self._kept_bytes, ticket.attempt)
        if isinstance(outcome, GeneratedImage) and ticket.asynchronous:
            self._run(scripts.END_WITH_IMAGE, *values, as_png(outcome.image))
        else:
            self._run(scripts.END, *values)

    def to_cancel(self, runner: int) -> list[tuple[str, int]]:
        members = self._run(scripts.TO_CANCEL, self._name(runner), *_OUTCOMES)
        assert isinstance(members, list)
        parts = [member.decode().rpartition(":") for member in members]
        return [(job_id, int(index)) for job_id, _, index in parts]

    def accept(
        self,
        ticket: Ticket,
        tasks: Sequence[Task],
        idempotency_key: str | None,
        fingerprint: str,
        image_format: ImageFormat | None = None,
    ) -> str:
        key = "" if idempotency_key is None else key_digest(ticket.owner, idempotency_key)
        images = [
            value for task in tasks for value in (described(task), task.num_inference_steps, _as_input(task.image), _as_input(task.mask))
        ]
        work = sum(task.width * task.height * task.num_inference_steps for task in tasks)
        values = (ticket.job_id, ticket.owner, key, fingerprint, image_format or "", *_OUTCOMES, ticket.timeout_s, work)
        answer = self._run(scripts.ACCEPT, *values, ticket.key_name or "", ticket.client_address or "", *images)
        assert isinstance(answer, list)
        match [value.decode() for value in answer]:
            case ["known", job_id]:
                return str(job_id)
            case ["mismatch"]:
                raise IdempotencyMismatch("Idempotency-Key: was used for another request", field="Idempotency-Key")
            case ["too many", unfinished, soonest_s]:
                raise TooManyJobs(
                    f"{unfinished} jobs with Prefer: respond-async or an Idempotency-Key are unfinished, no more are accepted",
                    retry_after_s=max(1, round(float(soonest_s))),
                )
            case ["no room"]:
                most = scripts.INPUT_BYTES >> 20
                raise TooManyJobs(
                    f"the images that unfinished jobs begin with may take {most} MiB together, try again later", retry_after_s=10
                )
            case _:
                return ticket.job_id

    def get(self, job_id: str, owner: str | None = None) -> list[JobRecord]:
        answer = self._run(scripts.GET, job_id, *_OUTCOMES)
        assert isinstance(answer, list)
        fields = _paired(answer[0])
        if "owner" not in fields or (owner is not None and fields["owner"].decode() != owner):
            raise UnknownJob("no such job; finished jobs are deleted after a day")
        return _records(job_id, fields, _paired(answer[1]))

    def cancel(self, job_id: str) -> None:
        self._run(scripts.CANCEL, job_id, _CANCELLED)

    def note_held(self, job_id: str) -> None:
        self._run(scripts.NOTE_HELD, job_id)

    def note_fetched(self, job_id: str) -> None:
        """Nothing to note: another machine has the image too."""

    def is_to_be_fetched(self, job_id: str) -> bool:
        return False

    def of_owner(self, owner: str) -> list[JobRecord]:
        jobs = self._run(scripts.OF_OWNER, owner, *_OUTCOMES)
        assert isinstance(jobs, list)
        records = [record for job_id, fields in jobs for record in _records(job_id.decode(), _paired(fields), {})]
        return [record for record in records if not record.is_ended]

    def cancel_of_owner(self, owner: str) -> None:
        self._run(scripts.CANCEL_OF_OWNER, owner, _CANCELLED)

    def abandon(self, job_id: str, error: ServiceError, attempt: int | None = None) -> None:
        which = "" if attempt is None else attempt
        self._run(scripts.ABANDON, job_id, state_of_error(error), json.dumps(error.facts()), self._kept_bytes, which)

    def take(self, most_images: int) -> Taken | None:
        answer = self._run(scripts.TAKE, self._machine, most_images, *_OUTCOMES)
        if answer is None:
            return None
        assert isinstance(answer, list)
        job_id, owner, timeout_s, key_name, client_address, *images = answer
        ticket = Ticket(
            job_id.decode(),
            owner.decode(),
            asynchronous=True,
            timeout_s=max(float(timeout_s), 0.001),
            key_name=key_name.decode() or None,
            client_address=client_address.decode() or None,
        )
        taken: list[tuple[Task, Ticket]] = []
        for place in range(0, len(images), 5):
            index, description, attempt, image, mask = images[place : place + 5]
            task = replace(task_of(description), image=_from_input(image), mask=_from_input(mask))
            taken.append((task, replace(ticket, index=int(index), attempt=int(attempt))))
        return Taken(ticket.job_id, tuple(taken))

    def give_back(self, ticket: Ticket, *, is_redraw: bool) -> None:
        self._run(scripts.GIVE_BACK, ticket.job_id, ticket.index, ticket.attempt, int(is_redraw), *_OUTCOMES)

    def waiting_work(self) -> WaitingWork:
        answer = self._run(scripts.WAITING)
        assert isinstance(answer, list)
        pixel_steps, runners = answer
        return WaitingWork(float(pixel_steps), int(runners))


def _as_input(image: Image.Image | None) -> bytes:
    return b"" if image is None else as_png(image)


def _from_input(png: bytes) -> Image.Image | None:
    return from_png(png) if png else None


def _paired(values: list[bytes]) -> dict[str, bytes]:
    """Names and values, which the store gives one after the other."""
    return {name.decode(): value for name, value in zip(values[::2], values[1::2], strict=True)}


def _records(job_id: str, fields: Mapping[str, bytes], images: Mapping[str, bytes]) -> list[JobRecord]:
    """The images of a job in order. `images`: those that are kept, by index."""
    indices = [index for index in range(int(fields.get("images", 0))) if f"{index}.task" in fields]
    return [_record(job_id, index, fields, images.get(str(index))) for index in indices]


def _record(job_id: str, index: int, fields: Mapping[str, bytes], image: bytes | None) -> JobRecord:
    own = {name.partition(".")[2]: value for name, value in fields.items() if name.startswith(f"{index}.")}
    seconds_left = own.get("seconds_left")
    return JobRecord(
        id=job_id,
        index=index,
        task=task_of(own["task"]),
        asynchronous=fields["asynchronous"] == b"1",
        state=own["state"].decode(),  # type: ignore[arg-type]
        progress=Progress(int(own["position"]), int(own["step"]), int(own["steps"]), float(seconds_left or 0)),
        is_estimated=seconds_left is not None,
        preview_png=own.get("preview"),
        image_format=fields.get("image_format", b"").decode() or None,  # type: ignore[arg-type]
        created_at=float(own["created_at"]),
        ended_at=float(own["ended_at"]) if "ended_at" in own else None,
        outcome=json.loads(own.get("outcome", b"{}")),
        image=image,
        attempt=int(own.get("attempt", 0)),
    )
