"""A job of the engine: its task and its state while it is being denoised.

Plain data. Only `denoiser.py` creates and reads the tensors in it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from stable_diffusion.core.schedulers import unet_calls_of_a_step
from stable_diffusion.core.types import GeneratedImage, Progress, Task

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from stable_diffusion.core.errors import ServiceError
    from stable_diffusion.engine.adapters import RowAdapters
    from stable_diffusion.engine.lora_store import Claim
    from stable_diffusion.engine.prompts import Text


# A row's successive texts, each with the last step, counted from 1, to which it applies.
TextSchedule: TypeAlias = "tuple[tuple[int, Text], ...]"


@dataclass(frozen=True)
class Conditioning:
    """The texts of a job's rows: first the negative prompt's, then those of the prompt's parts, whose weights are `weights`."""

    rows: tuple[TextSchedule, ...]
    weights: tuple[float, ...] = (1.0,)

    def at(self, step: int) -> tuple[Text, ...]:
        """The text of each row in a step, counted from 1."""
        return tuple(next(text for last, text in schedule if step <= last) for schedule in self.rows)


@dataclass(frozen=True)
class TextRows:
    """A job's embeddings: `tokens` (rows, tokens, width), with a mask where rows differ in length, and perhaps `pooled` (rows, width)."""

    tokens: torch.Tensor
    mask: torch.Tensor | None
    pooled: torch.Tensor | None


@dataclass
class Latents:
    """The tensors of one job. Shapes: latents and noise (1, 4, height/8, width/8)."""

    latents: torch.Tensor
    conditioning: Conditioning
    scheduler: Any
    timesteps: torch.Tensor  # on the CPU, for the scheduler
    unet_timesteps: torch.Tensor  # the same as float32 on the device, for the UNet
    generator: torch.Generator
    step_arguments: dict[str, Any]
    dropped_prompt: str
    dropped_negative_prompt: str
    guided_steps: int  # the number of guided UNet calls at the start; after them the job has one row
    chunks: int = 1  # of 75 tokens, of its longest text
    adapters: RowAdapters = ()  # of each of its rows
    guidance_embedding: torch.Tensor | None = None  # (1, width), for models that take the guidance scale as an input
    texts: tuple[Text, ...] = ()  # whose embeddings these are
    embeddings: TextRows | None = None
    time_ids: torch.Tensor | None = None  # (1, 6), in Stable Diffusion XL
    copies_in_steps: bool = False  # the noise scheduler, or what is outside the mask, copies to the device in each step
    tiled: bool = False  # the autoencoder worked in tiles
    step_index: int = 0
    preview: Image.Image | None = None  # of the last step, if it was due; an eighth of the size
    # Inpainting on a 4-channel UNet: after each step the area outside the mask is restored.
    inpainting_mask: torch.Tensor | None = None
    image_latents: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    # Inpainting on a 9-channel UNet: mask and masked image, appended to the latents in every step.
    extra_channels: torch.Tensor | None = None

    @property
    def is_guided(self) -> bool:
        """Whether the next UNet call has rows of both prompts."""
        return self.step_index < self.guided_steps or len(self.conditioning.weights) > 1

    @property
    def rows(self) -> int:
        """Rows of the next UNet call. A guided step has one without and one with the prompt (Ho and Salimans 2022).

        A prompt of several parts has a row for each and is guided in every step (Liu et al. 2022, composable diffusion).
        """
        return len(self.conditioning.rows) if self.is_guided else 1


_numbers = itertools.count(1)


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
    claim: Claim | None = None  # on its LoRAs, from the first attempt to prepare it to its end
    tensors: Latents | None = None

    @property
    def is_guided(self) -> bool:
        """Whether the next UNet call has rows of both prompts."""
        return self.tensors is not None and self.tensors.is_guided

    @property
    def rows(self) -> int:
        """Rows of the next UNet call."""
        return 1 if self.tensors is None else self.tensors.rows

    @property
    def cost(self) -> float:
        """The job's share of a step's work, in guided jobs whose prompt has one part."""
        return (1 + self.task.parts) / 2

    @property
    def batch_key(self) -> tuple[int, int]:
        """Height and width. Jobs with the same key can share a UNet call, since they all use the one loaded model."""
        return self.task.height, self.task.width

    @property
    def steps_left(self) -> int:
        """The remaining UNet calls; an estimate until the job is prepared."""
        if self.tensors is None:
            return int(self.task.num_inference_steps * self.task.strength) * unet_calls_of_a_step(self.task.scheduler)
        return len(self.tensors.timesteps) - self.tensors.step_index

    @property
    def is_denoised(self) -> bool:
        return self.tensors is not None and self.tensors.step_index >= len(self.tensors.timesteps)
