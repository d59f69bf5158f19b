"""The model process's side of jobs: hands tasks to the engine, stores the progress of jobs, and cancels jobs on request.

If the job store fails or is slow, generation goes on: progress is then dropped, ends wait for a shared store that is away. Does not depend
on HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from stable_diffusion.core.errors import Cancelled, GenerationFailed, JobsUnavailable, ServiceError, SharedStateUnavailable
from stable_diffusion.core.types import GeneratedImage, Progress, Task, Ticket
from stable_diffusion.engine.job import Job
from stable_diffusion.images.transform import keep_outside_mask
from stable_diffusion.runner.wire import pack_outcome, pack_progress, pack_taken_on, unpack_task
from stable_diffusion.state.jobs import Jobs

if TYPE_CHECKING:
    from stable_diffusion.engine.engine import Engine

logger = logging.getLogger("stable_diffusion")

_POLL_CANCELLATIONS_S = 0.2  # a full-size step on a GPU takes longer
_STORE_RETRY_S = 10.0
_STORE_PROGRESS_S = 0.5  # when a job ends, all queue positions change: store them together
_STORE_THREADS = 4
# While a shared store is away. A try then fails at once.
_SHARED_STORE_RETRY_S = 1.0
_KEPT_FOR_STORE_S = 600.0  # an image that nobody waits for
_LONGEST_PAUSE_S = 15.0
_ENDS_KEPT = 10_000  # of jobs whose images were sent in their responses; each is less than a kilobyte


@dataclass(frozen=True)
class _Generation:
    """One running task. `updates` ends with its outcome, and has its progress only where a client follows it.

    `beginning` ends when the job store knows the task.
    """

    ticket: Ticket
    task: Task
    engine_job: Job
    updates: asyncio.Queue[Progress | GeneratedImage | ServiceError]
    beginning: asyncio.Task[Any]


class ModelProcess:
    """All jobs of one model process. Use it on one event loop."""

    def __init__(self, engine: Engine, jobs: Jobs, runner: int) -> None:
        """`runner`: the number of this process among those that share `jobs`."""
        self._engine = engine
        self._jobs = jobs
        self._runner = runner
        self._generations: dict[tuple[str, int], _Generation] = {}  # until their outcome is known
        self._endings: set[asyncio.Task[None]] = set()
        self._unstored_progress: dict[Ticket, Progress] = {}
        self._progress_lock = threading.Lock()
        self._is_shared_store_away = False  # whether the last call that failed was to a store that machines share
        self._synchronising: asyncio.Task[None] | None = None
        # Threads of its own: a slow store must not keep images waiting for a thread.
        self._store_threads = ThreadPoolExecutor(_STORE_THREADS, "job store")
        with suppress(JobsUnavailable):
            jobs.register_runner(runner)

    async def generate(self, packed: dict[str, Any]) -> AsyncGenerator[str, None]:
        """Run one task: yield its acceptance, its progress if the client follows it, and its outcome.

        Closing this generator early cancels the job, unless it is asynchronous.
        """
        task, ticket, follow = unpack_task(packed)
        try:
            generation = self._start(task, ticket, follow=follow)
        except ServiceError as refusal:
            yield pack_outcome(refusal)
            return
        try:
            yield pack_taken_on()
            while isinstance(update := await generation.updates.get(), Progress):
                yield pack_progress(update)
            yield pack_outcome(update)
        finally:
            if not ticket.asynchronous:
                self._cancel(generation)

    def _start(self, task: Task, ticket: Ticket, *, follow: bool) -> _Generation:
        loop = asyncio.get_running_loop()

        def receive(update: Progress | GeneratedImage | ServiceError) -> None:
            loop.call_soon_threadsafe(lambda: self._receive(generation, update))

        def receive_progress(progress: Progress) -> None:
            self._note_progress(ticket, progress)
            if follow:  # else nothing waits for it: each step of each job would wake the event loop, which then holds up the next step
                receive(progress)

        engine_job = self._engine.submit(task, receive, receive_progress, owner=ticket.owner, timeout_s=ticket.timeout_s)
        # In an asyncio task, so that the engine's updates do not wait for the job store.
        beginning = asyncio.create_task(self._begin(ticket, task))
        generation = _Generation(ticket, task, engine_job, asyncio.Queue(), beginning)
        if (earlier := self._generations.get((ticket.job_id, ticket.index))) is not None:  # a job that was taken away and comes again
            self._engine.cancel(earlier.engine_job)
        self._generations[ticket.job_id, ticket.index] = generation
        if self._synchronising is None or self._synchronising.done():
            self._synchronising = asyncio.create_task(self._synchronise_with_store())
        return generation

    def _cancel(self, generation: _Generation) -> None:
        """Cancel a job. Does nothing if it has ended."""
        self._engine.cancel(generation.engine_job)
        self._receive(generation, Cancelled("the job was cancelled"))

    def _receive(self, generation: _Generation, update: Progress | GeneratedImage | ServiceError) -> None:
        """Pass an update on. Drops updates after the outcome: a job may end by itself while it is being cancelled."""
        ticket = generation.ticket
        if self._generations.get((ticket.job_id, ticket.index)) is not generation:
            return
        if isinstance(update, Progress):
            generation.updates.put_nowait(update)
            return
        del self._generations[ticket.job_id, ticket.index]
        with self._progress_lock:
            self._unstored_progress.pop(ticket, None)
        self._keep(self._end(generation, update))

    def _note_progress(self, ticket: Ticket, progress: Progress) -> None:
        """Keep the newest progress, with the newest preview, until it is stored. Called on the engine's thread.

        The store ignores the progress of a job that has ended, which may come here after its cancellation.
        """
        with self._progress_lock:
            last = self._unstored_progress.get(ticket)
            self._unstored_progress[ticket] = progress if progress.preview or last is None else replace(progress, preview=last.preview)

    async def _end(self, generation: _Generation, outcome: GeneratedImage | ServiceError) -> None:
        """Pass the outcome on to the client and to the job store.

        A waiting client gets the image first. An asynchronous job ends only when its image is in the store.
        """
        ticket = generation.ticket
        try:
            outcome = await asyncio.to_thread(_with_original_outside_mask, generation.task, outcome)
        except Exception:
            logger.exception("The image of job %s was generated but could not be finished.", ticket.job_id)
            outcome = GenerationFailed("the image was generated but could not be finished")
        if not ticket.asynchronous:
            generation.updates.put_nowait(outcome)
        await generation.beginning
        if not ticket.asynchronous:
            self._keep(self._store_end(ticket, _without_pixels(outcome)))
            return
        if not await self._store_image(ticket, outcome):
            outcome = GenerationFailed("the image was generated but could not be stored")
            await self._call_store(self._jobs.end, ticket, outcome)
        generation.updates.put_nowait(outcome)

    async def _begin(self, ticket: Ticket, task: Task) -> None:
        """Store that this process has the job, at the latest when a shared store is back."""
        while not await self._call_store(self._jobs.begin, ticket, task, self._runner):
            if not self._is_shared_store_away:
                return
            await asyncio.sleep(_SHARED_STORE_RETRY_S)
            if (ticket.job_id, ticket.index) not in self._generations:
                return  # its end is stored next, which says enough

    async def _store_image(self, ticket: Ticket, outcome: GeneratedImage | ServiceError) -> bool:
        """Store the end of an asynchronous job. Returns whether that worked, after waiting for a shared store that is away."""
        deadline_s = time.monotonic() + _KEPT_FOR_STORE_S
        while not await self._call_store(self._jobs.end, ticket, outcome):
            if not self._is_shared_store_away or time.monotonic() > deadline_s:
                return False
            await asyncio.sleep(_SHARED_STORE_RETRY_S)
        return True

    async def _store_end(self, ticket: Ticket, outcome: GeneratedImage | ServiceError) -> None:
        """Store the end of a job whose client has its image, however long a shared store is away."""
        pause_s = _SHARED_STORE_RETRY_S
        while not await self._call_store(self._jobs.end, ticket, outcome):
            if not self._is_shared_store_away or len(self._endings) > _ENDS_KEPT:
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` as a task; the event loop holds only a weak reference to it."""
        ending = asyncio.create_task(work)
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    async def _synchronise_with_store(self) -> None:
        """While jobs run, cancel those with a cancellation request and regularly store the progress of all."""
        stored_s = 0.0
        while self._generations:
            await asyncio.sleep(_POLL_CANCELLATIONS_S)
            to_cancel = await self._call_store(self._jobs.to_cancel, self._runner)
            if to_cancel is None:
                # The log gives the reason of a file's failure each time.
                await asyncio.sleep(_SHARED_STORE_RETRY_S if self._is_shared_store_away else _STORE_RETRY_S)
                continue
            for key in to_cancel:
                if (generation := self._generations.get(key)) is not None:
                    self._cancel(generation)
            if self._unstored_progress and time.monotonic() - stored_s >= _STORE_PROGRESS_S:
                with self._progress_lock:
                    notes, self._unstored_progress = self._unstored_progress, {}
                await self._call_store(self._jobs.note, notes)
                stored_s = time.monotonic()

    async def _call_store(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call the job store on a thread. Returns None if that fails, else the result of the call, or True if it returns None.

        A failing store affects only clients that follow jobs, not generation. The store logs the error.
        """
        try:
            returned = await asyncio.get_running_loop().run_in_executor(self._store_threads, call, *arguments)
        except JobsUnavailable as error:
            self._is_shared_store_away = isinstance(error, SharedStateUnavailable)
            return None
        return True if returned is None else returned


def _without_pixels(outcome: GeneratedImage | ServiceError) -> GeneratedImage | ServiceError:
    """The outcome for a job that keeps no image: one that waits for the store should not hold it."""
    return replace(outcome, image=outcome.image.crop((0, 0, 1, 1))) if isinstance(outcome, GeneratedImage) else outcome


def _with_original_outside_mask(task: Task, outcome: GeneratedImage | ServiceError) -> GeneratedImage | ServiceError:
    """Restore the original outside the mask of an inpainted image."""
    if not isinstance(outcome, GeneratedImage) or task.image is None or task.mask is None or outcome.flagged:
        return outcome
    return replace(outcome, image=keep_outside_mask(outcome.image, task.image, task.mask))
