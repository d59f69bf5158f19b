"""One line of JSON for each request that makes or changes something or has no key, when it has ended, and for each job that nobody
waited for.

Says who asked for how much, how long it took and how it ended. Knows no header, no body, no picture and no secret; prompts only if
they are asked for. What is drawn notes itself here: the line of a request is that of the context which the request runs in.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, TypeVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_diffusion.engine.job import Picture, Task
from stable_diffusion.errors import GenerationFailed, ServiceError, Unauthorized

logger = logging.getLogger("stable_diffusion.requests")

PROMPTS_VARIABLE = "SD_LOG_PROMPTS"
_LOGGED_METHODS = ("POST", "DELETE")
_MAX_PATH_CHARACTERS = 200

T = TypeVar("T")


@dataclass
class _Line:
    """What is known so far of a request, or of a job once nobody waits for it: then there is no `answer`."""

    scope: Scope
    answer: dict[str, Any] | None = None
    began_s: float = field(default_factory=time.monotonic)
    tasks: dict[int, dict[str, Any]] = field(default_factory=dict)  # by the number of their pictures, which begin in any order
    waited_for: int = 0  # pictures
    flags: list[bool | None] = field(default_factory=list)  # of those that are there
    waits_s: list[float] = field(default_factory=list)
    error: ServiceError | None = None

    def values(self) -> dict[str, Any]:
        """What goes into the log. What is not known is left out."""
        scope, first = self.scope, self.tasks[min(self.tasks)] if self.tasks else {}
        client, job = scope.get("client"), scope.get("job")
        known = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "id": scope.get("path_values", {}).get("job_id") or (job.id if job else None),
            "key": scope.get("key_name"),
            "client": client[0] if client else None,
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

    def note_picture(self, picture: Picture) -> None:
        self.flags.append(picture.flagged)
        if picture.waited_s is not None:
            self.waits_s.append(picture.waited_s)

    def note_end(self, error: ServiceError | None, flagged: bool | None) -> None:
        if error is None:
            self.flags.append(flagged)
        else:
            self.error = self.error or error


def _outcome_of_error(status: int) -> str:
    """Of a status from 400 on. 499: nobody waited for it any more, or somebody cancelled it."""
    if status == 499:
        return "cancelled"
    return "refused" if status < 500 else "failed"


_current: ContextVar[_Line | None] = ContextVar("request_log_line", default=None)


class RequestLog:
    """Middleware of an API worker, around all that may refuse a request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        _write_to_standard_output()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        answer = {"method": scope["method"], "path": scope["path"][:_MAX_PATH_CHARACTERS]}
        line = _Line(scope, answer)
        is_logged = scope["method"] in _LOGGED_METHODS
        _current.set(line if is_logged else None)  # a request may begin in the context of the one before it on its connection

        async def noting_status(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer["status"] = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting_status)
        finally:
            if is_logged or answer.get("status") == Unauthorized.status:
                _write(line)


def identify(scope: Scope) -> None:
    """From now on the request has this scope, which says its job and the name of its key."""
    if (line := _current.get()) is not None:
        line.scope = scope


@contextmanager
def noting(task: Task, index: int) -> Iterator[Callable[[Picture], None]]:
    """While `task`, picture number `index` of the current request or job, is drawn; what is given is to be called with its picture."""
    line = _current.get() or _Line({})
    line.tasks[index] = _described(task)
    line.waited_for += 1
    try:
        yield line.note_picture
    except Exception as error:
        line.error = line.error or (error if isinstance(error, ServiceError) else GenerationFailed("a defect"))
        raise


@contextmanager
def waiting_for_job() -> Iterator[Callable[[ServiceError | None, bool | None], None]]:
    """While the current request waits for a job that goes on without it; what is given is to be called with the job's error, or without
    one with whether its picture is flagged.
    """
    line = _current.get() or _Line({})
    line.waited_for += 1
    yield line.note_end


def note_accepted(task: Task) -> None:
    """The current request is for `task` and does not wait for it."""
    if (line := _current.get()) is not None:
        line.tasks[0] = _described(task)


async def as_job(drawing: Coroutine[Any, Any, T], is_taken_on: Callable[[], bool]) -> T:
    """Await the drawing of a job for which no request waits: it has a line of its own when it has ended, if it was taken on.

    To be run as a task.
    """
    asked = _current.get()
    line = _Line({} if asked is None else asked.scope)
    _current.set(line)
    try:
        return await drawing
    finally:
        if is_taken_on():
            _write(line)


def _described(task: Task) -> dict[str, Any]:
    values: dict[str, Any] = {
        "kind": task.kind,
        "width": task.width,
        "height": task.height,
        "steps": task.num_inference_steps,
        "seed": task.seed,
    }
    if os.environ.get(PROMPTS_VARIABLE) == "1":
        values |= {"prompt": task.prompt, "negative_prompt": task.negative_prompt}
    return values


def _write(line: _Line) -> None:
    logger.info("%s", json.dumps(line.values()))  # in ASCII: whatever a client sent, it is one line


def _write_to_standard_output() -> None:
    """As it is, without what BentoML puts before its lines: programs read it."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
