"""diffusers' own pipelines, used like in the projects that this one is compared with.

One call generates one task, or several that differ only in prompt and seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from PIL import Image

from benchmarks.setup import Setup
from stable_diffusion.core.schedulers import class_and_options
from stable_diffusion.core.types import Task
from stable_diffusion.engine.loading import Parts, placement


class Plain:
    """The three pipelines with one set of weights."""

    def __init__(self, setup: Setup, parts: Parts | None = None) -> None:
        """`parts`: loaded weights."""
        text_to_image = self._load(setup) if parts is None else _of_parts(parts)
        self._configuration = text_to_image.scheduler.config
        text_to_image.scheduler = DDIMScheduler.from_config(text_to_image.scheduler.config)
        self._pipelines: dict[str, Any] = {
            "txt2img": text_to_image,
            "img2img": StableDiffusionImg2ImgPipeline(**text_to_image.components, requires_safety_checker=False),
            "inpaint": StableDiffusionInpaintPipeline(**text_to_image.components, requires_safety_checker=False),
        }
        for pipeline in self._pipelines.values():
            pipeline.set_progress_bar_config(disable=True)

    @staticmethod
    def _load(setup: Setup) -> Any:
        device, dtype = placement(setup.precision)
        return StableDiffusionPipeline.from_pretrained(setup.model, dtype=dtype).to(device)

    def generate_with(self, scheduler: str, task: Task) -> Image.Image:
        """One task with the noise scheduler of that name."""
        name, options = class_and_options(scheduler)
        pipeline = self._pipelines[task.kind]
        usual = pipeline.scheduler
        pipeline.scheduler = getattr(diffusers, name).from_config(self._configuration, **options)
        try:
            (image,) = self.generate([task])
        finally:
            pipeline.scheduler = usual
        return image

    def generate(self, tasks: Sequence[Task]) -> list[Image.Image]:
        first = tasks[0]
        arguments: dict[str, Any] = {}
        if first.kind != "img2img":
            arguments |= {"width": first.width, "height": first.height}
        if first.kind != "txt2img":
            arguments |= {"image": [one.image for one in tasks], "strength": first.strength}
        if first.kind == "inpaint":
            arguments |= {"mask_image": [one.mask for one in tasks]}
        images: list[Image.Image] = self._pipelines[first.kind](
            prompt=[one.prompt for one in tasks],
            negative_prompt=[one.negative_prompt for one in tasks],
            num_inference_steps=first.num_inference_steps,
            guidance_scale=first.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(one.seed) for one in tasks],
            **arguments,
        ).images
        return images


def _of_parts(parts: Parts) -> Any:
    return StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoders[0].model,
        tokenizer=parts.text_encoders[0].tokenizer,
        unet=parts.unet,
        scheduler=parts.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
