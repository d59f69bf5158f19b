"""diffusers' own pipelines, as those use them that this project is compared with.

One call draws one task, or several that agree in all but prompt and seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from PIL import Image

from stable_diffusion.engine.job import Task
from stable_diffusion.pipelines import placement

if TYPE_CHECKING:
    from benchmarks.contenders import Setup


class Plain:
    """The three pipelines with one set of weights."""

    def __init__(self, setup: Setup) -> None:
        device, dtype = placement(setup.precision)
        text_to_image = StableDiffusionPipeline.from_pretrained(setup.model, dtype=dtype).to(device)
        text_to_image.scheduler = DDIMScheduler.from_config(text_to_image.scheduler.config)
        self._pipelines: dict[str, Any] = {
            "txt2img": text_to_image,
            "img2img": StableDiffusionImg2ImgPipeline(**text_to_image.components, requires_safety_checker=False),
            "inpaint": StableDiffusionInpaintPipeline(**text_to_image.components, requires_safety_checker=False),
        }
        for pipeline in self._pipelines.values():
            pipeline.set_progress_bar_config(disable=True)

    def draw(self, tasks: Sequence[Task]) -> list[Image.Image]:
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
