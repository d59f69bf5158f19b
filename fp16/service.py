"""Stable Diffusion as a BentoML service: text to image, image to image and inpainting. Requests share the model's steps.

Both precisions have this file; what it calls is in `stable_diffusion/`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import bentoml

from stable_diffusion.runner.startup import start_model_process
from stable_diffusion.server.service import create_service

PRECISION: Final = "fp16"  # the one line in which the services differ
MAX_BATCH_SIZE = 10  # at most so many images share a step; how many do is measured when the model process starts
FOLDER = Path(__file__).parent

# Served from the store, where nobody names the file, the workers would give up after BentoML's 60 seconds.
os.environ.setdefault("BENTOML_CONFIG", str(FOLDER / "configuration.yaml"))


class StableDiffusionRunnable(bentoml.Runnable):
    """The model, in a process of its own.

    Its methods are asynchronous generators, the one kind that BentoML calls again while it is still running: so a request joins the
    running batch at its next step.
    """

    SUPPORTED_RESOURCES = ("nvidia.com/gpu", "cpu")
    SUPPORTS_CPU_MULTI_THREADING = True

    def __init__(self) -> None:
        self._process = start_model_process(FOLDER, PRECISION, MAX_BATCH_SIZE)

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


stable_diffusion_runner = bentoml.Runner(StableDiffusionRunnable, name="stable_diffusion_runner", max_batch_size=MAX_BATCH_SIZE)

svc = create_service(f"stable_diffusion_{PRECISION}", stable_diffusion_runner, FOLDER)
