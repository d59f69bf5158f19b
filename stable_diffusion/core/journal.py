"""The request log: a line of JSON for each POST and DELETE, each request without a valid API key, and each asynchronous job.

A line is written at the end. It records the caller, the amount of work, the duration and the outcome. It contains no header, body, image
or secret, and prompts only if the operator asks for them. Code that generates adds its facts to the line of the current context.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, TypeVar

from stable_diffusion.core.errors import GenerationFailed, ServiceError
from stable_diffusion.core.types import GeneratedImage, RequestContext, Task, Ticket

T = TypeVar("T")
# Takes the job's error, or None and whether its image was flagged.
NoteEnd = Callable[[ServiceError | None, bool | None], None]
logger = logging.getLogger("stable_diffusion.requests")


@dataclass
class Line:
    """What is known so far of a request, or of an asynchronous job, which has no response (`answer`)."""

    with_prompts: bool = False
    client: str | None = None  # its address
    context: RequestContext | None = None
    answer: dict[str, Any] | None = None
    began_s: float = field(default_factory=time.monotonic)
    tasks: dict[int, dict[str, Any]] = field(default_factory=dict)  # by image index; images may start in any order
    waited_for: int = 0  # images
    flags: list[bool | None] = field(default_factory=list)  # of the images that are finished
    waits_s: list[float] = field(default_factory=list)
    error: ServiceError | None = None

    def values(self) -> dict[str, Any]:
        """The values for the log, without those that are unknown."""
        first, context = self.tasks[min(self.tasks)] if self.tasks else {}, self.context
        known = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "id": None if context is None else context.job_in_path or context.job_id,
            "key": None if context is None else context.key_name,
            "client": self.client,
            **(self.answer or {}),
            **first,
            "images": len(self.tasks) or None,
            "wait_s": round(min(self.waits_s), 3) if self.waits_s else None,
            "time_s": round(time.monotonic() - self.began_s, 3),
            "outcome": self.outcome(),
        }
        return {name: value for name, value in known.items() if value is not None}

    def outcome(self) -> str:
        status = None if self.answer is None else self.answer.get("status")
        if status == 202:
            return "accepted"
        if self.error is not None:
            return _outcome_of_error(self.error.status)
        if self.answer is not None and (status is None or status >= 400):
            return "refused" if status == 503 and not self.tasks else _outcome_of_error(status or 499)
        if len(self.flags) < self.waited_for:
            return "cancelled"
        return "flagged" if any(self.flags) else "completed"

    def note_task(self, task: Task, index: int) -> None:
        values: dict[str, Any] = {
            "kind": task.kind,
            "width": task.width,
            "height": task.height,
            "steps": task.num_inference_steps,
            "seed": task.seed,
        }
        if self.with_prompts:
            values |= {"prompt": task.prompt, "negative_prompt": task.negative_prompt}
        self.tasks[index] = values

    def note_image(self, image: GeneratedImage) -> None:
        self.flags.append(image.flagged)
        if image.waited_s is not None:
            self.waits_s.append(image.waited_s)

    def note_end(self, error: ServiceError | None, flagged: bool | None) -> None:
        if error is None:
            self.flags.append(flagged)
        else:
            self.error = self.error or error


def _outcome_of_error(status: int) -> str:
    """The outcome for a status of 400 or more. 499 means that the client left or that the job was cancelled."""
    if status == 499:
        return "cancelled"
    return "refused" if status < 500 else "failed"


current_line: ContextVar[Line | None] = ContextVar("request_log_line", default=None)


def identify(context: RequestContext) -> None:
    """Add the job and the API key of the current request to its line."""
    if (line := current_line.get()) is not None:
        line.context = context


@contextmanager
def noting(task: Task, index: int) -> Iterator[Callable[[GeneratedImage], None]]:
    """Note `task` as image number `index` of the current request or job. The caller passes the finished image to the yielded function."""
    line = current_line.get() or Line()
    line.note_task(task, index)
    line.waited_for += 1
    try:
        yield line.note_image
    except Exception as error:
        line.error = line.error or (error if isinstance(error, ServiceError) else GenerationFailed("a defect"))
        raise


@contextmanager
def waiting_for_job() -> Iterator[NoteEnd]:
    """Note that the current request waits for a job that also runs without it. The caller tells the yielded function how the job ended."""
    line = current_line.get() or Line()
    line.waited_for += 1
    yield line.note_end


def note_accepted(tasks: Sequence[Task]) -> None:
    """Note that the current request has started a job of `tasks`, which goes on without it."""
    if (line := current_line.get()) is not None:
        for index, task in enumerate(tasks):
            line.note_task(task, index)


async def as_job(generation: Coroutine[Any, Any, T], is_accepted: Callable[[], bool]) -> T:
    """Await an asynchronous job, which gets a line of its own when it ends, if the model process accepted it.

    Run this as a task of its own: it sets the context's current line.
    """
    of_request = current_line.get()
    line = Line() if of_request is None else Line(of_request.with_prompts, of_request.client, of_request.context)
    current_line.set(line)
    try:
        return await generation
    finally:
        if is_accepted():
            write_line(line)


async def as_taken_job(ticket: Ticket, generation: Coroutine[Any, Any, T], is_accepted: Callable[[], bool], *, with_prompts: bool) -> T:
    """As `as_job`, for a job that any machine may have accepted: the ticket says for whom."""
    current_line.set(Line(with_prompts, ticket.client_address, RequestContext(ticket.job_id, key_name=ticket.key_name)))
    return await as_job(generation, is_accepted)


def write_line(line: Line) -> None:
    logger.info("%s", json.dumps(line.values()))  # ASCII, so that no text of a client can break the line
