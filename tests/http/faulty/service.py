"""The service on a denoiser that fails where a prompt says so. For tests; everything but that is as in `fp32/`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bentoml

from stable_diffusion.runner.startup import start_model_process
from stable_diffusion.server.service import create_service

if TYPE_CHECKING:
    from stable_diffusion.engine.denoiser import Denoiser
    from stable_diffusion.engine.loading import Parts

FOLDER = Path(__file__).parent  # without weights: the demo model


def faulty_denoiser(parts: Parts) -> Denoiser:
    from tests.faults import FaultyDenoiser  # with torch, which API workers do without

    return FaultyDenoiser(parts)


class FaultyRunnable(bentoml.Runnable):
    SUPPORTED_RESOURCES = ("nvidia.com/gpu", "cpu")
    SUPPORTS_CPU_MULTI_THREADING = True

    def __init__(self) -> None:
        self._process = start_model_process(FOLDER, "fp32", 10, make_denoiser=faulty_denoiser)

    @bentoml.Runnable.method(batchable=False)
    async def txt2img(self, task: dict[str, Any]) -> AsyncIterator[str]:
        async with aclosing(self._process.generate(task)) as lines:
            async for line in lines:
                yield line

    @bentoml.Runnable.method(batchable=False)
    async def img2img(self, task: dict[str, Any]) -> AsyncIterator[str]:
        async with aclosing(self._process.generate(task)) as lines:
            async for line in lines:
                yield line

    @bentoml.Runnable.method(batchable=False)
    async def inpaint(self, task: dict[str, Any]) -> AsyncIterator[str]:
        async with aclosing(self._process.generate(task)) as lines:
            async for line in lines:
                yield line


svc = create_service("stable_diffusion_faulty", bentoml.Runner(FaultyRunnable, name="faulty_runner"), FOLDER)
