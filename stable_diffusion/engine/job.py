"""What one request asks of the engine, and its state while it is being denoised.

Plain data: the tensors in it are made and read by `denoiser.py` only.
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
    guided_steps: int  # the first ones; after them the job has one row
    step_index: int = 0
    preview: Image.Image | None = None  # of the last step, if that was to have one; an eighth of the size
    # Inpainting on a 4-channel UNet: after each step, what is outside the mask is put back.
    mask: torch.Tensor | None = None
    image_latents: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    # Inpainting on a 9-channel UNet: mask and masked image, appended to the latents of every step.
    extra_channels: torch.Tensor | None = None


_numbers = itertools.count(1)
_UNET_CALLS_OF_A_STEP = {"HeunDiscreteScheduler": 2}  # a method of second order


@dataclass(eq=False)
class Job:
    """One task on its way through the engine.

    On the engine's thread `on_end` is called once, and before that `on_progress` whenever position or step have changed.
    """

    task: Task
    on_end: Callable[[GeneratedImage | ServiceError], None]
    on_progress: Callable[[Progress], None] | None = None
    owner: str = ""  # whose it is: the device is shared between owners
    deadline_s: float = math.inf  # by the clock of submitted_s; a job that has not ended by then is dropped before its next step
    reported: tuple[int, int] | None = None  # position and step
    number: int = field(default_factory=lambda: next(_numbers))
    submitted_s: float = field(default_factory=time.perf_counter)
    started_s: float | None = None  # when its first step began, by the same clock
    is_ended: bool = False
    tensors: Latents | None = None

    @property
    def rows(self) -> int:
        """Rows of the next UNet call: a guided step has one without and one with the prompt (Ho and Salimans 2022)."""
        return 2 if self.tensors is not None and self.tensors.step_index < self.tensors.guided_steps else 1

    @property
    def batch_key(self) -> tuple[int, int]:
        """Height and width. Jobs of one key can share a UNet call: everything else is the one loaded model's."""
        return self.task.height, self.task.width

    @property
    def steps_left(self) -> int:
        """UNet calls that it still needs; before it is prepared about so many."""
        if self.tensors is None:
            return int(self.task.num_inference_steps * self.task.strength) * _UNET_CALLS_OF_A_STEP.get(self.task.scheduler, 1)
        return len(self.tensors.timesteps) - self.tensors.step_index

    @property
    def is_denoised(self) -> bool:
        return self.tensors is not None and self.tensors.step_index >= len(self.tensors.timesteps)
