"""Whether an image can be generated now and, if not, how far the model process is. API workers ask this.

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

_ANSWERS_WITHIN_S = 5  # for a process that is ready, even on a busy machine
_UNKNOWN_ANSWERS_WITHIN_S = 1  # for a process without a status file
_ASKED_AGAIN_S = 1.0


class Readiness:
    """The readiness of the model processes of one runner. Use it on one event loop."""

    def __init__(self, runner: bentoml.Runner) -> None:
        self._runner = runner
        self._asking: asyncio.Future[bool] | None = None
        self._asked_s = 0.0

    async def is_ready(self) -> bool:
        """Whether a model process has loaded its model and answers."""
        runners = await run_in_threadpool(living_runners)
        return await (self._answers(_ANSWERS_WITHIN_S) if _has_ready(runners) else self._answers_unknown(runners))

    async def require_ready(self) -> None:
        """Raises ModelLoading, which says how far the model process is."""
        runners = await run_in_threadpool(living_runners)
        if _has_ready(runners) or await self._answers_unknown(runners):
            return
        raise ModelLoading(f"the model process is not ready: {stage_of(runners, ready=False)}")

    async def _answers_unknown(self, runners: list[RunnerState]) -> bool:
        """Whether a process answers although it could not write a status file."""
        return not runners and await self._answers(_UNKNOWN_ANSWERS_WITHIN_S)

    async def _answers(self, within_s: int) -> bool:
        """Whether a process answers. It is asked at most once per second, however many callers there are."""
        now_s = time.monotonic()
        if self._asking is None or (self._asking.done() and now_s - self._asked_s >= _ASKED_AGAIN_S):
            self._asking, self._asked_s = asyncio.ensure_future(_ask(self._runner, within_s)), now_s
        return await asyncio.shield(self._asking)


NOT_ANSWERING = "not answering"


def stage_of(runners: list[RunnerState], *, ready: bool) -> str:
    """The stage of the runner that is furthest, or NOT_ANSWERING if it claims to be ready but does not answer."""
    if ready:
        return "ready"
    furthest = max((runner.stage for runner in runners), key=STAGES.index, default=STAGES[0])
    return NOT_ANSWERING if furthest == "ready" else furthest


def _has_ready(runners: list[RunnerState]) -> bool:
    return any(runner.stage == "ready" for runner in runners)


async def _ask(runner: bentoml.Runner, within_s: int) -> bool:
    """BentoML's own readiness check. Connections to a process that is starting wait."""
    try:
        return bool(await runner.runner_handle_is_ready(timeout=within_s))
    except aiohttp.ClientError:
        return False
