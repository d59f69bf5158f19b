"""Stable Diffusion in single precision as a BentoML service. What is the same in both precisions is in `stable_diffusion/`."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import bentoml

from stable_diffusion.core.settings import read_limits
from stable_diffusion.models.folder import ModelFolder, choose_model
from stable_diffusion.runner.process import RunnerJobs
from stable_diffusion.runner.startup import start_engine
from stable_diffusion.server.service import create_service
from stable_diffusion.state.folder import shared_folder
from stable_diffusion.state.jobs import Jobs

HERE = Path(__file__).parent
WEIGHTS = HERE / "models" / "v1_4"
# A built bento keeps this folder as src/, beside its own description.
IN_BENTO = (HERE.parent / "bento.yaml").is_file()
MAX_BATCH_SIZE = 10

# Served from the store, where nobody names the file, the workers would give up after BentoML's 60 seconds.
os.environ.setdefault("BENTOML_CONFIG", str(HERE / "configuration.yaml"))


def model() -> ModelFolder:
    return choose_model(WEIGHTS, os.environ, in_bento=IN_BENTO)


class StableDiffusionRunnable(bentoml.Runnable):
    SUPPORTED_RESOURCES = ("nvidia.com/gpu", "cpu")
    SUPPORTS_CPU_MULTI_THREADING = True

    def __init__(self, max_batch_size: int) -> None:
        index = bentoml.server_context.worker_index or 0
        limits = read_limits(os.environ)
        engine = start_engine(model(), "fp32", max_batch_size, runner_index=index, limits=limits)
        self._jobs = RunnerJobs(engine, Jobs(shared_folder), index)

    # An async generator is the one kind of method that BentoML calls again while it is still running,
    # so that a request can join the others at their next step.
    @bentoml.Runnable.method(batchable=False)
    async def draw(self, task: dict[str, Any]) -> AsyncIterator[str]:
        async with aclosing(self._jobs.draw(task)) as outcome:
            async for line in outcome:
                yield line


stable_diffusion_runner = bentoml.Runner(
    StableDiffusionRunnable,
    name="stable_diffusion_runner",
    runnable_init_params={"max_batch_size": MAX_BATCH_SIZE},
    max_batch_size=MAX_BATCH_SIZE,
)

svc = create_service("stable_diffusion_fp32", stable_diffusion_runner, model, in_bento=IN_BENTO)
