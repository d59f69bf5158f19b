"""What every door needs to have something drawn: the runner, which model it has, where jobs stand, what is uploaded.

Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import bentoml
from starlette.concurrency import run_in_threadpool

from stable_diffusion.draining import Unfinished
from stable_diffusion.jobs import Jobs
from stable_diffusion.safety import SafetyPolicy
from stable_diffusion.uploads import Uploads
from stable_diffusion.weights import ModelFolder

_MAX_DECODES = 2  # at once in a worker: a picture of the largest size takes some 300 MB while it is decoded

T = TypeVar("T")


@dataclass(frozen=True)
class Backend:
    """`model` says which model the runner has loaded, or raises ModelFolderError; `policy` what is checked, or raises SettingError."""

    runner: bentoml.Runner
    model: Callable[[], ModelFolder]
    policy: Callable[[], SafetyPolicy]
    jobs: Jobs
    unfinished: Unfinished
    uploads: Uploads = field(default_factory=Uploads)
    _decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_MAX_DECODES))

    async def decode(self, work: Callable[[], T]) -> T:
        """Run what decodes or scales uploads on a thread, few at a time."""
        async with self._decoding:
            return await run_in_threadpool(work)
