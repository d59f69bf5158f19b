"""A job of the engine: its task and its state while it is being denoised.

Plain data. Only `denoiser.py` creates and reads the tensors in it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stable_diffusion.core.types import GeneratedImage, Progress, Task

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from stable_diffusion.core.errors import ServiceError


@dataclass
class Latents:
    """The tensors of one job. Shapes: latents and noise (1, 4, height/8, width/8), embeddings (rows, tokens, width)."""

    latents: torch.Tensor
    embeddings: torch.Tensor
    scheduler: Any
    timesteps: torch.Tensor  # on the CPU, for the scheduler
    unet_timesteps: torch.Tensor  # the same as float32 on the device, for the UNet
    generator: torch.Generator
    step_arguments: dict[str, Any]
    dropped_prompt: str
    dropped_negative_prompt: str
    guided_steps: int  # the number of guided UNet calls at the start; after them the job has one row
    step_index: int = 0
    preview: Image.Image | None = None  # of the last step, if it was due; an eighth of the size
    # Inpainting on a 4-channel UNet: after each step the area outside the mask is restored.
    mask: torch.Tensor | None = None
    image_latents: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    # Inpainting on a 9-channel UNet: mask and masked image, appended to the latents in every step.
    extra_channels: torch.Tensor | None = None


_numbers = itertools.count(1)
_UNET_CALLS_OF_A_STEP = {"HeunDiscreteScheduler": 2}  # a second-order method


@dataclass(eq=False)
class Job:
    """One task on its way through the engine.

    The engine's thread calls `on_progress` whenever the position or the step has changed, and finally `on_end` once.
    """

    task: Task
    on_end: Callable[[GeneratedImage | ServiceError], None]
    on_progress: Callable[[Progress], None] | None = None
    owner: str = ""  # owners share the device
    deadline_s: float = math.inf  # same clock as submitted_s; a job that has not ended by then is dropped before its next step
    reported: tuple[int, int] | None = None  # the last reported position and step
    number: int = field(default_factory=lambda: next(_numbers))
    submitted_s: float = field(default_factory=time.perf_counter)
    started_s: float | None = None  # start of its first step, same clock
    is_ended: bool = False
    tensors: Latents | None = None

    @property
    def rows(self) -> int:
        """Rows of the next UNet call: a guided step has one row without and one with the prompt (Ho and Salimans 2022)."""
        return 2 if self.tensors is not None and self.tensors.step_index < self.tensors.guided_steps else 1

    @property
    def batch_key(self) -> tuple[int, int]:
        """Height and width. Jobs with the same key can share a UNet call, since they all use the one loaded model."""
        return self.task.height, self.task.width

    @property
    def steps_left(self) -> int:
        """The remaining UNet calls; an estimate until the job is prepared."""
        if self.tensors is None:
            return int(self.task.num_inference_steps * self.task.strength) * _UNET_CALLS_OF_A_STEP.get(self.task.scheduler, 1)
        return len(self.tensors.timesteps) - self.tensors.step_index

    @property
    def is_denoised(self) -> bool:
        return self.tensors is not None and self.tensors.step_index >= len(self.tensors.timesteps)
