"""Tells API workers whether an image can be generated now and, if not, which stage of its start the model process has reached.

A model process is ready once it has generated an image. A process that has died is no longer ready.
"""

from __future__ import annotations

import asyncio
import time

import aiohttp
import bentoml
from starlette.concurrency import run_in_threadpool

from stable_diffusion.core.errors import ModelLoading
from stable_diffusion.state.runner_status import STAGES, RunnerState, living_runners

_TIMEOUT_S = 5  # for a process that is ready, even on a busy machine
_TIMEOUT_WITHOUT_STATUS_S = 1  # for a process without a status file
_ASK_INTERVAL_S = 1.0


class Readiness:
    """The readiness of the model processes of one runner. Use it on one event loop."""

    def __init__(self, runner: bentoml.Runner) -> None:
        self._runner = runner
        self._asking: asyncio.Future[bool] | None = None
        self._asked_s = 0.0

    async def is_ready(self) -> bool:
        """Whether a model process has loaded its model and responds."""
        runners = await run_in_threadpool(living_runners)
        return await (self._responds(_TIMEOUT_S) if _has_ready(runners) else self._responds_without_status(runners))

    async def require_ready(self) -> None:
        """Raises ModelLoading, which names the stage of the model process, if none is ready."""
        runners = await run_in_threadpool(living_runners)
        if _has_ready(runners) or await self._responds_without_status(runners):
            return
        raise ModelLoading(f"the model process is not ready: {stage_of(runners, ready=False)}")

    async def _responds_without_status(self, runners: list[RunnerState]) -> bool:
        """Whether a process without a status file responds: it may have been unable to write one."""
        return not runners and await self._responds(_TIMEOUT_WITHOUT_STATUS_S)

    async def _responds(self, timeout_s: int) -> bool:
        """Whether a process responds. Asks it at most once per second, however many callers there are."""
        now_s = time.monotonic()
        if self._asking is None or (self._asking.done() and now_s - self._asked_s >= _ASK_INTERVAL_S):
            self._asking, self._asked_s = asyncio.ensure_future(_ask(self._runner, timeout_s)), now_s
        return await asyncio.shield(self._asking)


NOT_ANSWERING = "not answering"


def stage_of(runners: list[RunnerState], *, ready: bool) -> str:
    """The stage of the runner that is furthest, or NOT_ANSWERING if it is ready but does not respond."""
    if ready:
        return "ready"
    furthest = max((runner.stage for runner in runners), key=STAGES.index, default=STAGES[0])
    return NOT_ANSWERING if furthest == "ready" else furthest


def _has_ready(runners: list[RunnerState]) -> bool:
    return any(runner.stage == "ready" for runner in runners)


async def _ask(runner: bentoml.Runner, timeout_s: int) -> bool:
    """BentoML's own readiness check. A process that is starting does not respond."""
    try:
        return bool(await runner.runner_handle_is_ready(timeout=timeout_s))
    except aiohttp.ClientError:
        return False
