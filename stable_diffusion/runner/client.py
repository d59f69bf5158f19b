"""An API worker's connection to the model process: sends tasks, receives progress and images, and starts asynchronous jobs.

Does not depend on HTTP requests and responses.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

import aiohttp
import anyio
import bentoml
from bentoml.exceptions import BentoMLException
from starlette.concurrency import run_in_threadpool

from stable_diffusion.core import journal
from stable_diffusion.core.errors import (
    GenerationFailed,
    JobsUnavailable,
    ModelUnavailable,
    ServiceError,
    ShuttingDown,
    as_service_error,
)
from stable_diffusion.core.shutdown import Unfinished
from stable_diffusion.core.types import GeneratedImage, Progress, Task, Ticket
from stable_diffusion.runner.readiness import Readiness
from stable_diffusion.runner.wire import TakenOn, pack_task, unpack_update
from stable_diffusion.state.job_record import JobRecord
from stable_diffusion.state.jobs import JobQueue, Jobs

logger = logging.getLogger("stable_diffusion")

_POLL_INTERVAL_S = 0.1
_ACCEPTANCE_TIMEOUT_S = 30.0
_TIME_TO_FETCH_S = 10.0
_NOTE_HELD_INTERVAL_S = 20.0
_ABANDON_RETRY_S = 5.0
_MAX_QUERIES_PER_S = 100  # of all followers to the job store: each takes 0.8 ms of a core


@dataclass(frozen=True)
class RunnerClient:
    """The model processes as an API worker sees them."""

    runner: bentoml.Runner
    jobs: Jobs
    unfinished: Unfinished
    queue: JobQueue | None = None  # None: this machine generates all jobs that it accepts
    followers: set[object] = field(default_factory=set)  # one for each client that follows a job
    may_take: asyncio.Event = field(default_factory=asyncio.Event)  # set when a job was accepted or has ended

    @cached_property
    def readiness(self) -> Readiness:
        return Readiness(self.runner)


Updates = AsyncGenerator[TakenOn | Progress | GeneratedImage, None]


async def generate(client: RunnerClient, task: Task, ticket: Ticket) -> GeneratedImage:
    return await _image_of(await begin(client, task, ticket, follow=False))


async def generate_all(client: RunnerClient, tasks: Sequence[Task], ticket: Ticket) -> list[GeneratedImage]:
    """Generate several images at once, so that they share the engine's steps. If one fails, the others are cancelled."""
    generations = [asyncio.ensure_future(generate(client, task, replace(ticket, index=index))) for index, task in enumerate(tasks)]
    try:
        return await asyncio.gather(*generations)
    finally:
        for one in generations:
            one.cancel()
        await asyncio.gather(*generations, return_exceptions=True)


async def begin(client: RunnerClient, task: Task, ticket: Ticket, *, follow: bool) -> Updates:
    """Hand a task to a model process. Returns when the process has accepted it; raises the reason if it has not.

    The returned generator yields the updates that follow, the image last. Closing it cancels the job, unless it is asynchronous.
    """
    if client.unfinished.is_stopping:
        raise ShuttingDown("the server is shutting down, try again in a minute")
    await client.readiness.require_ready()
    updates = _updates(client, task, ticket, follow=follow)
    try:
        # A stopping model process neither responds on new connections nor closes them. asyncio.wait_for is no alternative: before
        # Python 3.12 it loses a cancellation that arrives together with the result.
        with anyio.fail_after(_ACCEPTANCE_TIMEOUT_S):
            await anext(updates)
    except TimeoutError:
        raise ModelUnavailable("the model process does not respond, try again in a minute") from None
    except BaseException:
        await updates.aclose()
        raise
    return updates


async def _image_of(updates: Updates) -> GeneratedImage:
    async with aclosing(updates):
        async for one in updates:
            if isinstance(one, GeneratedImage):
                return one
    raise AssertionError("updates end with an image or an error")


async def _updates(client: RunnerClient, task: Task, ticket: Ticket, *, follow: bool) -> Updates:
    """The updates of a task: TakenOn, with `follow` its progress, and its image. Raises the error with which it ends."""
    stream = getattr(client.runner, task.kind).async_stream(pack_task(task, ticket, follow=follow))
    has_image = False
    with journal.noting(task, ticket.index) as note_image:
        try:
            async with aclosing(_lines(stream, client.unfinished.grace_is_over)) as lines:
                async for line in lines:  # to the end, so that BentoML can reuse the connection
                    one = await run_in_threadpool(unpack_update, line)
                    if isinstance(one, GeneratedImage):
                        has_image = True
                        note_image(one)
                    yield one
        except asyncio.TimeoutError:
            raise GenerationFailed("the image was not finished within the runner timeout of the server's configuration") from None
        except (BentoMLException, aiohttp.ClientError) as error:
            logger.error("The model process cannot be reached: %s", error)
            raise ModelUnavailable("the model process cannot be reached, try again in a minute") from None
        if not has_image:
            raise ModelUnavailable("the model process stopped before the image was finished, try again in a minute")


async def _lines(stream: AsyncGenerator[str, None], grace_is_over: asyncio.Event) -> AsyncGenerator[str, None]:
    """Yield the lines of `stream`, whose pieces may end anywhere within a line: the line with the image is long. Closes `stream`.

    Raises ShuttingDown once `grace_is_over` is set.
    """
    ending = asyncio.ensure_future(grace_is_over.wait())
    piece: asyncio.Future[str | None] = ending.get_loop().create_future()
    pieces: list[str] = []
    try:
        while True:
            piece = asyncio.ensure_future(anext(stream, None))
            await asyncio.wait({piece, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not piece.done():
                raise ShuttingDown("the server is shutting down and could not finish the image, try again in a minute")
            if (content := piece.result()) is None:
                return
            pieces.append(content)
            if "\n" in content:
                *lines, rest = "".join(pieces).split("\n")
                pieces = [rest]
                for line in lines:
                    yield line
    finally:
        ending.cancel()
        piece.cancel()
        await asyncio.gather(ending, piece, return_exceptions=True)
        await stream.aclose()


async def generate_asynchronously(client: RunnerClient, tasks: Sequence[Task], ticket: Ticket) -> None:
    """Hand an accepted job, with one task for each of its images, to a model process. The job store records its progress.

    Returns when the process has accepted all tasks; raises the reason if it has not, which also ends the job.
    Connections to the model process stay open until the job has ended: BentoML stops all processes at once, and each waits for its
    open connections.
    """
    refusal: asyncio.Future[ServiceError | None] = asyncio.get_running_loop().create_future()

    async def hold() -> None:
        with client.unfinished.piece_of_work():
            images = [(task, replace(ticket, index=index)) for index, task in enumerate(tasks)]
            error = await journal.as_job(hold_images(client, images, refusal), lambda: refusal.done() and refusal.result() is None)
            await _abandon(client, ticket.job_id, error)
            with suppress(JobsUnavailable):
                await _time_to_fetch(client, ticket.job_id)

    holding = asyncio.create_task(hold())
    _jobs_in_progress.add(holding)
    holding.add_done_callback(_jobs_in_progress.discard)
    if (error := await asyncio.shield(refusal)) is not None:
        raise error
    journal.note_accepted(tasks)


async def hold_images(
    client: RunnerClient, images: Sequence[tuple[Task, Ticket]], refusal: asyncio.Future[ServiceError | None]
) -> ServiceError:
    """Hand the images of an asynchronous job to a model process and wait until they have ended.

    `refusal` gets the reason if the model process has not accepted them, else None. Returns the error to store if the model process has
    not stored the outcome.
    """
    job_id = images[0][1].job_id
    where = f"Job {job_id}"
    begun: list[Updates] = []
    try:
        for task, ticket in images:
            begun.append(await begin(client, task, ticket, follow=False))
    except Exception as error:
        known = as_service_error(error, where)
        refusal.set_result(known)
        for updates in begun:
            await updates.aclose()
        return known
    refusal.set_result(None)
    generation = asyncio.ensure_future(_all_images_of(begun))
    while not (await asyncio.wait({generation}, timeout=_NOTE_HELD_INTERVAL_S))[0]:
        with suppress(JobsUnavailable):
            await run_in_threadpool(client.jobs.note_held, job_id)
    return as_service_error(generation.exception() or GenerationFailed("the image was generated but could not be stored"), where)


async def _all_images_of(begun: Sequence[Updates]) -> None:
    """Wait for the images. If one fails, stop waiting for the others."""
    waiting = [asyncio.ensure_future(_image_of(updates)) for updates in begun]
    try:
        await asyncio.gather(*waiting)
    finally:
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _abandon(client: RunnerClient, job_id: str, error: ServiceError) -> None:
    """End the job, unless it has ended. Retries until it succeeds: otherwise the job would occupy its place and its followers for ever."""
    while True:
        try:
            return await run_in_threadpool(client.jobs.abandon, job_id, error)
        except JobsUnavailable:
            if client.unfinished.is_stopping:  # the job store ends with the server
                return
        await asyncio.sleep(_ABANDON_RETRY_S)


async def _time_to_fetch(client: RunnerClient, job_id: str) -> None:
    """During a shutdown, give the client time to fetch the image, which is lost when the server ends."""
    deadline = time.monotonic() + _TIME_TO_FETCH_S
    while time.monotonic() < deadline:
        if client.unfinished.is_stopping and not await run_in_threadpool(client.jobs.is_to_be_fetched, job_id):
            return
        await asyncio.sleep(_POLL_INTERVAL_S)


_jobs_in_progress: set[asyncio.Task[None]] = set()  # event loops hold only weak references to tasks


async def follow(client: RunnerClient, job_id: str) -> AsyncGenerator[list[JobRecord], None]:
    """Yield the records of a job's images whenever they have changed, until all have ended. Raises UnknownJob."""
    last: list[JobRecord] = []
    follower = object()
    client.followers.add(follower)
    try:
        while True:
            records = await run_in_threadpool(client.jobs.get, job_id)
            if records != last:
                yield records
                last = records
            if all(record.is_ended for record in records):
                return
            await asyncio.sleep(max(_POLL_INTERVAL_S, len(client.followers) / _MAX_QUERIES_PER_S))
    finally:
        client.followers.discard(follower)
