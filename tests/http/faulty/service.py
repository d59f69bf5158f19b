"""The service on a denoiser that fails where a prompt says so. For tests; everything but that is as in `fp32/`."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import bentoml

from stable_diffusion.core.settings import read_limits
from stable_diffusion.models.folder import DEMO_FOLDER, ModelFolder, check_model
from stable_diffusion.runner.process import RunnerJobs
from stable_diffusion.runner.startup import start_engine
from stable_diffusion.server.service import create_service
from stable_diffusion.state.folder import shared_folder
from stable_diffusion.state.jobs import Jobs

if TYPE_CHECKING:
    from stable_diffusion.engine.denoiser import Denoiser
    from stable_diffusion.engine.loading import Parts


def model() -> ModelFolder:
    return check_model(DEMO_FOLDER, name="demo", is_demo=True)


def faulty_denoiser(parts: Parts) -> Denoiser:
    from tests.faults import FaultyDenoiser  # with torch, which API workers do without

    return FaultyDenoiser(parts)


class FaultyRunnable(bentoml.Runnable):
    SUPPORTED_RESOURCES = ("nvidia.com/gpu", "cpu")
    SUPPORTS_CPU_MULTI_THREADING = True

    def __init__(self) -> None:
        index = bentoml.server_context.worker_index or 0
        engine = start_engine(model(), "fp32", 10, runner_index=index, limits=read_limits(os.environ), make_denoiser=faulty_denoiser)
        self._jobs = RunnerJobs(engine, Jobs(shared_folder), index)

    @bentoml.Runnable.method(batchable=False)
    async def draw(self, task: dict[str, Any]) -> AsyncIterator[str]:
        async with aclosing(self._jobs.draw(task)) as outcome:
            async for line in outcome:
                yield line


svc = create_service("stable_diffusion_faulty", bentoml.Runner(FaultyRunnable, name="faulty_runner"), model, in_bento=False)
