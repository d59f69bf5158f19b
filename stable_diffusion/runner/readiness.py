"""Whether a picture can be drawn now, and if not, how far the model process is. Asked by API workers.

A model process is ready once it has drawn a picture; one that has died is not ready from then on.
"""

from __future__ import annotations

import asyncio
import time

import aiohttp
import bentoml
from starlette.concurrency import run_in_threadpool

from stable_diffusion.core.errors import ModelLoading
from stable_diffusion.state.runner_status import STAGES, RunnerState, living_runners

_ANSWERS_WITHIN_S = 5  # a process that is ready, however busy the machine is
_UNKNOWN_ANSWERS_WITHIN_S = 1  # one of which nothing is known
_ASKED_AGAIN_S = 1.0


class Readiness:
    """Of the model processes of one runner. To be used on one event loop."""

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
        """Whether a process answers that could not write down how far it is."""
        return not runners and await self._answers(_UNKNOWN_ANSWERS_WITHIN_S)

    async def _answers(self, within_s: int) -> bool:
        """Asked once in a while, however many ask here: the model process has better things to do."""
        now_s = time.monotonic()
        if self._asking is None or (self._asking.done() and now_s - self._asked_s >= _ASKED_AGAIN_S):
            self._asking, self._asked_s = asyncio.ensure_future(_ask(self._runner, within_s)), now_s
        return await asyncio.shield(self._asking)


NOT_ANSWERING = "not answering"


def stage_of(runners: list[RunnerState], *, ready: bool) -> str:
    """How far the first of them is; of one that says that it is ready and does not answer, that."""
    if ready:
        return "ready"
    furthest = max((runner.stage for runner in runners), key=STAGES.index, default=STAGES[0])
    return NOT_ANSWERING if furthest == "ready" else furthest


def _has_ready(runners: list[RunnerState]) -> bool:
    return any(runner.stage == "ready" for runner in runners)


async def _ask(runner: bentoml.Runner, within_s: int) -> bool:
    """BentoML's own question. While a process is being started, connections to it wait."""
    try:
        return bool(await runner.runner_handle_is_ready(timeout=within_s))
    except aiohttp.ClientError:
        return False
