"""An API worker's side of the way to the model process: a task there, news and the picture back.

Knows nothing of requests and answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import aiohttp
import bentoml
from bentoml.exceptions import BentoMLException
from starlette.concurrency import run_in_threadpool

from stable_diffusion.engine.job import Picture, Progress, Task
from stable_diffusion.errors import ModelUnavailable
from stable_diffusion.runnable import pack_task, unpack_news

logger = logging.getLogger("stable_diffusion")


async def draw(runner: bentoml.Runner, task: Task) -> Picture:
    async with aclosing(news_of(runner, task, follow=False)) as news:
        async for one in news:
            if isinstance(one, Picture):
                return one
    raise AssertionError("news end with a picture or an error")


async def draw_all(runner: bentoml.Runner, tasks: Sequence[Task]) -> list[Picture]:
    """Several at once, so that they share the engine's steps. The first one that fails ends the others."""
    drawing = [asyncio.ensure_future(draw(runner, task)) for task in tasks]
    try:
        return await asyncio.gather(*drawing)
    finally:
        for one in drawing:
            one.cancel()
        await asyncio.gather(*drawing, return_exceptions=True)


async def news_of(runner: bentoml.Runner, task: Task, *, follow: bool) -> AsyncGenerator[Progress | Picture, None]:
    """Have the runner draw, and pass on what it says; a picture comes last. Closing this cancels the job there."""
    stream = runner.draw.async_stream(pack_task(task, follow=follow))
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
    except (BentoMLException, aiohttp.ClientError, asyncio.TimeoutError) as error:
        logger.error("The runner did not answer: %s", error)
        raise ModelUnavailable("the model process cannot be reached, try again in a minute") from None
    finally:
        await stream.aclose()
    if not has_picture:
        raise ModelUnavailable("the model process stopped before the picture was finished, try again in a minute")
