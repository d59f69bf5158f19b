"""From a validated request to a task: resolves what the request leaves open and fits images to the output size.

All APIs that generate use it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from PIL import Image

from stable_diffusion.core.errors import InvalidRequest
from stable_diffusion.core.requests import (
    MAX_PIXEL_STEPS,
    SEED_LIMIT,
    GenerationRequest,
    ImageToImageRequest,
    TextToImageRequest,
    random_seed,
)
from stable_diffusion.core.safety import SafetyPolicy, is_checked
from stable_diffusion.core.types import Kind, Task
from stable_diffusion.images.transform import digest, fit, output_size, scale_mask
from stable_diffusion.models.folder import ModelFolder


def kinds_of(model: ModelFolder) -> tuple[Kind, ...]:
    """The kinds of task that `model` supports."""
    return ("inpaint",) if model.only_inpaints else get_args(Kind)


def text_task(parameters: TextToImageRequest, model: ModelFolder, policy: SafetyPolicy) -> Task:
    """The task of a txt2img request. Raises InvalidRequest if the model only inpaints, or if the policy forbids the request."""
    _require_whole_pictures(model)
    size = parameters.width or model.native_width, parameters.height or model.native_height
    return _task("txt2img", parameters, model, policy, *size)


def image_task(
    parameters: ImageToImageRequest, model: ModelFolder, policy: SafetyPolicy, picture: Image.Image, mask: Image.Image | None = None
) -> Task:
    """The task of an img2img request or, with a mask (L, white is repainted), of an inpaint request. Takes up to a second.

    The image and the mask are scaled to the output size. Raises InvalidRequest if the policy forbids the request, if the mask has other
    proportions than the image, or if the model only inpaints and there is no mask.
    """
    native = model.native_width, model.native_height
    size = output_size(picture.size, native, parameters.width, parameters.height)
    if mask is None:
        _require_whole_pictures(model)
        return _task("img2img", parameters, model, policy, *size, fit(picture, *size))
    mask = fit(scale_mask(mask, picture.size, "mask"), *size)
    return _task("inpaint", parameters, model, policy, *size, fit(picture, *size), mask)


def consecutive_tasks(task: Task, count: int) -> list[Task]:
    """The tasks of a request for `count` images: image i equals that of a request for one image with the seed increased by i.

    Raises InvalidRequest if they are too much work in total.
    """
    _require_bounded_work(task.width, task.height, task.num_inference_steps, count)
    return [replace(task, seed=(task.seed + index) % SEED_LIMIT) for index in range(count)]


def with_previews(task: Task, every_steps: int, policy: SafetyPolicy) -> Task:
    """The same task with previews. Raises InvalidRequest if `policy` checks every image, since nothing checks a preview."""
    if every_steps and policy == "always":
        raise InvalidRequest("this server checks every picture, so it sends no previews of what has not been checked")
    return replace(task, preview_every_steps=every_steps)


def _require_bounded_work(width: int, height: int, steps: int, count: int) -> None:
    pixel_steps = width * height * steps * count
    if pixel_steps > MAX_PIXEL_STEPS:
        raise InvalidRequest(
            f"{count} x {width} x {height} pixels x {steps} steps are {pixel_steps} pixel steps, at most {MAX_PIXEL_STEPS} are allowed: "
            "ask for fewer pictures, fewer steps or a smaller size"
        )


def _require_whole_pictures(model: ModelFolder) -> None:
    if model.only_inpaints:
        raise InvalidRequest(f"the model {model.name} only inpaints: it needs a picture and a mask")


def _task(
    kind: Kind,
    parameters: GenerationRequest,
    model: ModelFolder,
    policy: SafetyPolicy,
    width: int,
    height: int,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
) -> Task:
    _require_bounded_work(width, height, parameters.num_inference_steps, 1)
    task = Task(
        kind=kind,
        prompt=parameters.prompt,
        negative_prompt=parameters.negative_prompt,
        width=width,
        height=height,
        num_inference_steps=parameters.num_inference_steps,
        guidance_scale=parameters.guidance_scale,
        guidance_end=parameters.guidance_end,
        metadata=parameters.metadata,
        seed=random_seed() if parameters.seed is None else parameters.seed,
        scheduler=parameters.scheduler or model.scheduler,
        safety_check=is_checked(parameters.safety_check, policy),
        strength=parameters.strength if isinstance(parameters, ImageToImageRequest) else 1.0,
        image=image,
        mask=mask,
        image_hash=None if image is None else digest(image),
        mask_hash=None if mask is None else digest(mask),
    )
    return with_previews(task, parameters.preview_every_steps, policy)
