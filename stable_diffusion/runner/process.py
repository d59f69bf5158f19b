"""The model process's side of jobs: hands tasks to the engine, stores how far each job is, and cancels jobs on request.

If the job store fails, generation goes on. Does not depend on HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from stable_diffusion.core.errors import Cancelled, GenerationFailed, JobsUnavailable, ServiceError
from stable_diffusion.core.types import GeneratedImage, Progress, Task, Ticket
from stable_diffusion.engine.job import Job
from stable_diffusion.images.transform import keep_outside_mask
from stable_diffusion.runner.wire import pack_outcome, pack_progress, pack_taken_on, unpack_task
from stable_diffusion.state.jobs import Jobs

if TYPE_CHECKING:
    from stable_diffusion.engine.engine import Engine

logger = logging.getLogger("stable_diffusion")

_LOOK_FOR_CANCELLATIONS_S = 0.05  # a full-size step on a GPU takes longer
_STORE_FAILED_S = 10.0
_NOTE_S = 0.5  # when a job ends, all queue positions change: store them together

Messages = asyncio.Queue[Progress | GeneratedImage | ServiceError]


@dataclass(frozen=True)
class _Generation:
    ticket: Ticket
    task: Task
    engine_job: Job
    from_engine: Messages
    to_client: Messages


class ModelProcess:
    """All jobs of one model process. Use it on one event loop."""

    def __init__(self, engine: Engine, jobs: Jobs, runner: int) -> None:
        """`runner`: the number of this process among those that share `jobs`."""
        self._engine = engine
        self._jobs = jobs
        self._runner = runner
        self._drawings: dict[tuple[str, int], _Generation] = {}
        self._attending: set[asyncio.Task[None]] = set()
        self._to_note: dict[Ticket, Progress] = {}
        self._keeping: asyncio.Task[None] | None = None
        with suppress(JobsUnavailable):
            jobs.fail_what_was_left(runner)

    async def generate(self, packed: dict[str, Any]) -> AsyncGenerator[str, None]:
        """Run one task: yield that it was taken on, its progress if that is followed, and its outcome.

        Closing this generator early cancels the job, unless it is an asynchronous one.
        """
        task, ticket, follow = unpack_task(packed)
        try:
            drawing = self._start(task, ticket)
        except ServiceError as refusal:
            yield pack_outcome(refusal)
            return
        try:
            yield pack_taken_on()
            while isinstance(what := await drawing.to_client.get(), Progress):
                if follow:
                    yield pack_progress(what)
            yield pack_outcome(what)
        finally:
            if not ticket.asynchronous:
                self._cancel(drawing)

    def _start(self, task: Task, ticket: Ticket) -> _Generation:
        loop = asyncio.get_running_loop()
        from_engine: Messages = asyncio.Queue()

        def tell(what: Progress | GeneratedImage | ServiceError) -> None:
            loop.call_soon_threadsafe(from_engine.put_nowait, what)

        engine_job = self._engine.submit(task, tell, tell, owner=ticket.owner, timeout_s=ticket.timeout_s)
        drawing = _Generation(ticket, task, engine_job, from_engine, asyncio.Queue())
        self._drawings[ticket.job_id, ticket.index] = drawing
        attending = asyncio.create_task(self._attend(drawing))
        self._attending.add(attending)
        attending.add_done_callback(self._attending.discard)
        if self._keeping is None or self._keeping.done():
            self._keeping = asyncio.create_task(self._keep_the_store())
        return drawing

    def _cancel(self, drawing: _Generation) -> None:
        """Cancel a job. Does nothing if it has ended."""
        self._engine.cancel(drawing.engine_job)
        drawing.from_engine.put_nowait(Cancelled("the job was cancelled"))

    async def _attend(self, drawing: _Generation) -> None:
        """Pass the engine's messages about a job on, first to the client, then to the job store."""
        ticket = drawing.ticket
        # A task of its own, so that the engine's messages do not wait for the store.
        beginning = asyncio.create_task(_noted(self._jobs.begin, ticket, drawing.task, self._runner))
        try:
            while isinstance(what := await drawing.from_engine.get(), Progress):
                drawing.to_client.put_nowait(what)
                last = self._to_note.get(ticket)
                self._to_note[ticket] = what if what.preview or last is None else replace(what, preview=last.preview)
            outcome = await asyncio.to_thread(_finished, drawing.task, what)
        except Exception:
            logger.exception("Job %s was drawn and could not be finished.", ticket.job_id)
            outcome = GenerationFailed("the picture could not be finished")
        # A waiting client gets the image at once. An asynchronous job reports its end only when its image is in the store.
        if not ticket.asynchronous:
            drawing.to_client.put_nowait(outcome)
        self._to_note.pop(ticket, None)
        await beginning
        if not await _noted(self._jobs.end, ticket, outcome) and ticket.asynchronous:
            outcome = GenerationFailed("the picture was drawn and could not be kept")
            await _noted(self._jobs.end, ticket, outcome)
        if ticket.asynchronous:
            drawing.to_client.put_nowait(outcome)
        del self._drawings[ticket.job_id, ticket.index]

    async def _keep_the_store(self) -> None:
        """While jobs run: cancel those with a cancellation request, and regularly store how far the jobs are."""
        noted = 0.0
        while self._drawings:
            await asyncio.sleep(_LOOK_FOR_CANCELLATIONS_S)
            to_cancel = await _noted(self._jobs.to_cancel, self._runner)
            if to_cancel is None:
                await asyncio.sleep(_STORE_FAILED_S)  # the log gives the reason each time
                continue
            for key in to_cancel:
                if (drawing := self._drawings.get(key)) is not None:
                    self._cancel(drawing)
            if self._to_note and time.monotonic() - noted >= _NOTE_S:
                notes, self._to_note = self._to_note, {}
                await _noted(self._jobs.note, notes)
                noted = time.monotonic()


async def _noted(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call the job store on a thread. Returns None if that failed, else the call's result, or True if there is none.

    A failing store affects only clients that follow jobs, not generation. The store logs the error.
    """
    try:
        returned = await asyncio.to_thread(call, *arguments)
    except JobsUnavailable:
        return None
    return True if returned is None else returned


def _finished(task: Task, outcome: GeneratedImage | ServiceError) -> GeneratedImage | ServiceError:
    """Restore the original outside the mask of an inpainted image."""
    if not isinstance(outcome, GeneratedImage) or task.image is None or task.mask is None or outcome.flagged:
        return outcome
    return replace(outcome, image=keep_outside_mask(outcome.image, task.image, task.mask))
