"""A denoiser on the demo model that fails as a task's prompts say, at a step that its seed chooses. Everything else is the real one's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from stable_diffusion.core.types import GeneratedImage, Task
from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.job import Job, Latents
from stable_diffusion.engine.lora_store import Claim

RAISES_WHEN_PREPARED = "raises when it is prepared"
RAISES_IN_A_STEP = "raises in a step"
RAISES_WHEN_DECODED = "raises when it is decoded"
TURNS_NAN = "turns into values that are no numbers"
DECODES_TO_BLACK = "is black when it is decoded first"
DECODES_TO_NAN = "is no numbers when it is decoded first"
NEVER_DECODES = "is no numbers whenever it is decoded"
FITS_ALONE_ONLY = "fits into memory alone only"
FITS_NEVER = "never fits into memory"
HANGS = "hangs in a step"
DEVICE_FAILS = "makes the device fail"

# What one job has to suffer for, and what nobody does.
FAILING = (RAISES_WHEN_PREPARED, RAISES_IN_A_STEP, RAISES_WHEN_DECODED, TURNS_NAN, NEVER_DECODES, FITS_NEVER)
DECODED_AGAIN = (DECODES_TO_BLACK, DECODES_TO_NAN)
CONTAINED = (*DECODED_AGAIN, FITS_ALONE_ONLY)

_HANGS_S = 600


class FaultyDenoiser(Denoiser):
    _decodings_to_spoil = 0
    _spoiled_with = 0.0

    def prepare(self, task: Task, claim: Claim | None = None) -> Latents:
        if RAISES_WHEN_PREPARED in _prompts(task):
            raise RuntimeError("on purpose")
        return super().prepare(task, claim)

    def predict(self, jobs: Sequence[Job]) -> list[torch.Tensor]:
        due = [_prompts(job.task) for job in jobs if _is_due(job)]
        if any(DEVICE_FAILS in prompt for prompt in due):
            _make_the_device_fail()
        if any(HANGS in prompt for prompt in due):
            time.sleep(_HANGS_S)
        if any(RAISES_IN_A_STEP in prompt for prompt in due):
            raise RuntimeError("on purpose")
        prompts = [_prompts(job.task) for job in jobs]
        if any(FITS_NEVER in prompt or (FITS_ALONE_ONLY in prompt and len(jobs) > 1) for prompt in prompts):
            raise torch.OutOfMemoryError("on purpose")
        return super().predict(jobs)

    def advance(self, job: Job, predicted: torch.Tensor) -> None:
        if TURNS_NAN in _prompts(job.task) and _is_due(job):
            predicted = torch.full_like(predicted, torch.nan)
        super().advance(job, predicted)

    def decode(self, job: Job) -> GeneratedImage:
        prompt = _prompts(job.task)
        if RAISES_WHEN_DECODED in prompt:
            raise RuntimeError("on purpose")
        self._decodings_to_spoil = 2 if NEVER_DECODES in prompt else int(any(fault in prompt for fault in DECODED_AGAIN))
        self._spoiled_with = -1.0 if DECODES_TO_BLACK in prompt else torch.nan
        return super().decode(job)

    def _to_pixels(self, vae: Any, state: Latents) -> torch.Tensor:
        pixels = super()._to_pixels(vae, state)
        if not self._decodings_to_spoil:
            return pixels
        self._decodings_to_spoil -= 1
        return torch.full_like(pixels, self._spoiled_with)


def _make_the_device_fail() -> None:
    """On a GPU for real: a kernel reads outside of its tensor, after which the device computes nothing more for this process."""
    if torch.cuda.is_available():
        position = torch.tensor([10**9], device="cuda")
        torch.zeros(1, device="cuda").index_select(0, position).cpu()
    raise torch.AcceleratorError("CUDA error: on purpose")


def _prompts(task: Task) -> str:
    return f"{task.prompt} {task.negative_prompt}"


def _is_due(job: Job) -> bool:
    return job.tensors is not None and job.tensors.step_index == job.task.seed % len(job.tensors.timesteps)
