"""An API worker's side of the way to the model process: a task there, news and the picture back, or a job for which nobody waits.

Knows nothing of requests and answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace

import aiohttp
import bentoml
from bentoml.exceptions import BentoMLException
from starlette.concurrency import run_in_threadpool

from stable_diffusion import request_log
from stable_diffusion.answers import known_error
from stable_diffusion.backend import Backend
from stable_diffusion.engine.job import Picture, Progress, Task
from stable_diffusion.errors import GenerationFailed, JobsUnavailable, ModelUnavailable
from stable_diffusion.jobs import JobRecord, Ticket
from stable_diffusion.runnable import pack_task, unpack_news

logger = logging.getLogger("stable_diffusion")

_LOOK_AGAIN_S = 0.1
_TIME_TO_FETCH_S = 10.0
_HELD_AGAIN_S = 20.0


async def draw(runner: bentoml.Runner, task: Task, ticket: Ticket) -> Picture:
    async with aclosing(news_of(runner, task, ticket, follow=False)) as news:
        async for one in news:
            if isinstance(one, Picture):
                return one
    raise AssertionError("news end with a picture or an error")


async def draw_all(runner: bentoml.Runner, tasks: Sequence[Task], ticket: Ticket) -> list[Picture]:
    """Several at once, so that they share the engine's steps. The first one that fails ends the others."""
    drawing = [asyncio.ensure_future(draw(runner, task, replace(ticket, index=index))) for index, task in enumerate(tasks)]
    try:
        return await asyncio.gather(*drawing)
    finally:
        for one in drawing:
            one.cancel()
        await asyncio.gather(*drawing, return_exceptions=True)


async def news_of(runner: bentoml.Runner, task: Task, ticket: Ticket, *, follow: bool) -> AsyncGenerator[Progress | Picture, None]:
    """Have the runner draw, and pass on what it says; a picture comes last. Closing this cancels the job there, if it is attended."""
    with request_log.noting(task) as note_picture:
        async with aclosing(_news_of(runner, task, ticket, follow=follow)) as news:
            async for one in news:
                if isinstance(one, Picture):
                    note_picture(one)
                yield one


async def _news_of(runner: bentoml.Runner, task: Task, ticket: Ticket, *, follow: bool) -> AsyncGenerator[Progress | Picture, None]:
    stream = runner.draw.async_stream(pack_task(task, ticket, follow=follow))
    pieces: list[str] = []
    has_picture = False
    try:
        async for piece in stream:
            pieces.append(piece)
            if "\n" in piece:  # lines are cut anywhere, and the one with the picture is long
                *lines, rest = "".join(pieces).split("\n")
                pieces = [rest]
                for line in lines:
                    one = await run_in_threadpool(unpack_news, line)
                    has_picture = isinstance(one, Picture)
                    yield one
    except asyncio.TimeoutError:
        raise GenerationFailed("the picture was not finished within the time that the server's configuration allows") from None
    except (BentoMLException, aiohttp.ClientError) as error:
        logger.error("The runner did not answer: %s", error)
        raise ModelUnavailable("the model process cannot be reached, try again in a minute") from None
    finally:
        await stream.aclose()
    if not has_picture:
        raise ModelUnavailable("the model process stopped before the picture was finished, try again in a minute")


def draw_unattended(backend: Backend, task: Task, ticket: Ticket) -> None:
    """Have the runner draw a job that was accepted; whoever wants to know how far it is asks the store.

    A connection to the runner is held until it is done: BentoML stops both processes at once, and each waits for what it has open.
    """

    async def hold() -> None:
        with backend.unfinished.piece_of_work(), suppress(JobsUnavailable):
            drawing = asyncio.ensure_future(request_log.as_job(draw(backend.runner, task, ticket)))
            while not (await asyncio.wait({drawing}, timeout=_HELD_AGAIN_S))[0]:
                with suppress(JobsUnavailable):
                    await run_in_threadpool(backend.jobs.note_held, ticket.job_id)
            error = drawing.exception() or GenerationFailed("the picture was drawn and could not be kept")
            # Nothing happens to a job that has its end already.
            await run_in_threadpool(backend.jobs.abandon, ticket.job_id, known_error(error, f"Job {ticket.job_id}"))
            await _time_to_fetch(backend, ticket.job_id)

    request_log.note_accepted(task)
    holding = asyncio.create_task(hold())
    _held.add(holding)
    holding.add_done_callback(_held.discard)


async def _time_to_fetch(backend: Backend, job_id: str) -> None:
    """A server that stops takes its pictures with it: whoever waited for one has a moment to fetch it."""
    deadline = time.monotonic() + _TIME_TO_FETCH_S
    while time.monotonic() < deadline:
        if backend.unfinished.is_stopping and not await run_in_threadpool(backend.jobs.is_to_be_fetched, job_id):
            return
        await asyncio.sleep(_LOOK_AGAIN_S)


_held: set[asyncio.Task[None]] = set()  # an event loop alone would let go of them


async def follow(backend: Backend, job_id: str) -> AsyncGenerator[list[JobRecord], None]:
    """Where the pictures of a job stand, whenever that has changed; last when all have ended. Raises UnknownJob."""
    last: list[JobRecord] = []
    while not (last and all(record.is_ended for record in last)):
        records = await run_in_threadpool(backend.jobs.get, job_id)
        if records != last:
            yield records
            last = records
        await asyncio.sleep(0 if all(record.is_ended for record in records) else _LOOK_AGAIN_S)
