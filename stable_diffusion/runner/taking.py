"""Takes accepted jobs from the queue that machines share, as many as this machine's model processes have room for, and sees them through.

Runs on the event loop of each API worker. Does not know who asked for a job.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from starlette.concurrency import run_in_threadpool

from stable_diffusion.core import journal
from stable_diffusion.core.errors import JobsUnavailable, ModelLoading, ModelUnavailable, QueueFull, ServiceError, ShuttingDown
from stable_diffusion.runner.client import RunnerClient, hold_images
from stable_diffusion.state.jobs import JobQueue, Taken
from stable_diffusion.state.runner_status import living_runners

logger = logging.getLogger("stable_diffusion")

_LOOK_S = 0.25  # for jobs that other machines have accepted
_RETRY_S = 1.0
# The machine could not generate the image now, and another one may.
_PASSED_ON = (QueueFull, ModelLoading, ModelUnavailable, ShuttingDown)


async def take_jobs(client: RunnerClient, logs_prompts: Callable[[], bool]) -> None:
    """Take jobs until the server stops. Returns at once if machines share no queue. `logs_prompts`: whether log lines contain them."""
    queue = client.queue
    if queue is None:
        return
    with_prompts = logs_prompts()
    in_progress: set[asyncio.Task[None]] = set()
    while not client.unfinished.is_stopping:
        client.may_take.clear()
        try:
            taken = await run_in_threadpool(_take, queue)
        except JobsUnavailable:
            await asyncio.sleep(_RETRY_S)
            continue
        except Exception:
            # Such as a job that a machine with another version has accepted. It goes back after a minute; this one takes the next.
            logger.exception("A job from the shared queue cannot be taken.")
            await asyncio.sleep(_RETRY_S)
            continue
        if taken is None:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(client.may_take.wait(), _LOOK_S)
        elif taken.images:
            generation = asyncio.create_task(_generate(client, queue, taken, with_prompts))
            in_progress.add(generation)
            generation.add_done_callback(in_progress.discard)


def _take(queue: JobQueue) -> Taken | None:
    """As many images at once as share a step of the model processes that are ready: more would wait here while others are idle."""
    limits = [runner.batch_limits[0].images for runner in living_runners() if runner.stage == "ready" and runner.batch_limits]
    return queue.take(sum(limits)) if limits else None


async def _generate(client: RunnerClient, queue: JobQueue, taken: Taken, with_prompts: bool) -> None:
    refusal: asyncio.Future[ServiceError | None] = asyncio.get_running_loop().create_future()

    def is_accepted() -> bool:
        return refusal.done() and refusal.result() is None

    with client.unfinished.piece_of_work():
        holding = hold_images(client, taken.images, refusal)
        error = await journal.as_taken_job(taken.images[0][1], holding, is_accepted, with_prompts=with_prompts)
        if isinstance(error, _PASSED_ON) and not isinstance(error, ModelUnavailable):
            await asyncio.sleep(_RETRY_S)  # else this machine would take it again at once
        while True:
            try:
                await run_in_threadpool(_settle, client, queue, taken, error)
                break
            except JobsUnavailable:
                if client.unfinished.is_stopping:
                    break  # another machine takes it when this one has fallen silent
            await asyncio.sleep(_RETRY_S)
    client.may_take.set()


def _settle(client: RunnerClient, queue: JobQueue, taken: Taken, error: ServiceError) -> None:
    """End what the model process has not ended, or give it back. Changes nothing where another machine has it by now."""
    for _, ticket in taken.images:
        if isinstance(error, _PASSED_ON):
            queue.give_back(ticket, is_redraw=isinstance(error, ModelUnavailable))
        else:
            client.jobs.abandon(ticket.job_id, error, ticket.attempt)
