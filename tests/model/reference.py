"""What our images are held against: those of diffusers' own pipelines, and how far two images differ."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from stable_diffusion.core.types import Task

PIPELINES = {
    "txt2img": StableDiffusionPipeline,
    "img2img": StableDiffusionImg2ImgPipeline,
    "inpaint": StableDiffusionInpaintPipeline,
}
XL_PIPELINES = {
    "txt2img": StableDiffusionXLPipeline,
    "img2img": StableDiffusionXLImg2ImgPipeline,
    "inpaint": StableDiffusionXLInpaintPipeline,
}

# As diffusers documents A1111's samplers (api/schedulers/overview), by what may follow a class's name in a scheduler's.
_OPTIONS: dict[str, dict[str, Any]] = {
    "Karras": {"use_karras_sigmas": True},
    "Exponential": {"use_exponential_sigmas": True},
    "Trailing": {"timestep_spacing": "trailing"},
    "SDE": {"algorithm_type": "sde-dpmsolver++"},
    "Heun": {"solver_type": "heun"},
    "3M": {"solver_order": 3},
}


@functools.cache
def pipeline_of(folder: Path, kind: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline as diffusers loads it, which shares nothing with our engine, and the settings of the scheduler that it came with."""
    pipelines = XL_PIPELINES if (folder / "text_encoder_2").exists() else PIPELINES
    pipeline = pipelines[kind].from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, pipeline.scheduler.config


def draw_with_diffusers(folder: Path, task: Task, **options_of_the_call: Any) -> Image.Image:
    """The task as a user of diffusers would draw it."""
    pipeline, scheduler_settings = pipeline_of(folder, task.kind)
    name, *words = task.scheduler.split(" ")
    options = {option: value for word in words for option, value in _OPTIONS[word].items()}
    pipeline.scheduler = getattr(diffusers, name).from_config(scheduler_settings, **options)
    arguments: dict[str, Any] = {"eta": task.eta, **options_of_the_call}
    if task.kind in ("txt2img", "inpaint"):
        arguments |= {"width": task.width, "height": task.height}
    if task.kind in ("img2img", "inpaint"):
        arguments |= {"image": task.image, "strength": task.strength}
    if task.kind == "inpaint":
        arguments |= {"mask_image": task.mask}
    images: list[Image.Image] = pipeline(
        prompt=task.prompt,
        negative_prompt=task.negative_prompt or None,
        num_inference_steps=task.num_inference_steps,
        guidance_scale=task.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(task.seed),
        **arguments,
    ).images
    return images[0]


def assert_same_picture(ours: Image.Image, theirs: Image.Image) -> None:
    assert ours.size == theirs.size
    assert np.array_equal(np.asarray(ours), np.asarray(theirs)), f"up to {np.ptp(np.asarray(ours).astype(int) - np.asarray(theirs))} levels"


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


def mean_difference(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).mean())
