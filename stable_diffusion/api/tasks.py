"""From a validated request to a task: resolves what the request leaves open and fits images to the output size.

All APIs that generate use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from PIL import Image

from stable_diffusion.api.context import Served
from stable_diffusion.core.errors import InvalidRequest
from stable_diffusion.core.limits import MAX_LORA_BYTES, MAX_LORAS, MAX_PARTS, MAX_TEXTS, SEED_LIMIT
from stable_diffusion.core.prompt_syntax import LoraTag, PromptError, check, check_negative, composed, scheduled, without_lora_tags
from stable_diffusion.core.requests import GenerationRequest, ImageToImageRequest, TextToImageRequest, random_seed, require_a_step
from stable_diffusion.core.safety import SafetyPolicy, is_checked
from stable_diffusion.core.schedulers import has_eta, sampler_of
from stable_diffusion.core.types import Kind, LoraChoice, Task
from stable_diffusion.images.transform import digest, fit, output_size, scale_mask
from stable_diffusion.models.folder import ModelFolder


def kinds_of(model: ModelFolder) -> tuple[Kind, ...]:
    """The kinds of task that `model` supports."""
    return ("inpaint",) if model.only_inpaints else get_args(Kind)


def text_task(parameters: TextToImageRequest, served: Served) -> Task:
    """The task of a txt2img request. Reads the files of its LoRAs at their first use.

    Raises InvalidRequest if the model only inpaints, if the policy forbids the request, or if a prompt has wrong syntax; LoraNotFound.
    """
    _refuse_model_that_only_inpaints(served.model)
    _require_sides(parameters.width, parameters.height, served.model)
    size = parameters.width or served.model.native_width, parameters.height or served.model.native_height
    return _task("txt2img", parameters, served, *size)


def image_task(parameters: ImageToImageRequest, served: Served, image: Image.Image, mask: Image.Image | None = None) -> Task:
    """The task of an img2img request or, with a mask (L, white is repainted), of an inpaint request. Takes up to a second.

    The image and the mask are scaled to the output size. Raises what `text_task` raises, and InvalidRequest if the mask does not
    have the proportions of the image, or if the model only inpaints and there is no mask.
    """
    native = served.model.native_width, served.model.native_height
    _require_sides(parameters.width, parameters.height, served.model)
    size = output_size(image.size, native, parameters.width, parameters.height, served.model.max_side)
    if mask is None:
        _refuse_model_that_only_inpaints(served.model)
        return _task("img2img", parameters, served, *size, fit(image, *size))
    mask = fit(scale_mask(mask, image.size, "mask"), *size)
    return _task("inpaint", parameters, served, *size, fit(image, *size), mask)


def consecutive_tasks(task: Task, count: int, model: ModelFolder) -> list[Task]:
    """The tasks of a request for `count` images: image i equals that of a request for one image with the seed increased by i.

    Raises InvalidRequest if they are too much work in total.
    """
    _require_bounded_work(task.width, task.height, task.num_inference_steps, count, model)
    return [replace(task, seed=(task.seed + index) % SEED_LIMIT) for index in range(count)]


def with_previews(task: Task, every_steps: int, policy: SafetyPolicy) -> Task:
    """The same task with previews. Raises InvalidRequest if `policy` checks every image, since nothing checks a preview."""
    if every_steps and policy == "always":
        raise InvalidRequest("this server checks every image, so it sends no previews, which are unchecked")
    return replace(task, preview_every_steps=every_steps)


def _require_bounded_work(width: int, height: int, steps: int, count: int, model: ModelFolder) -> None:
    pixel_steps = width * height * steps * count
    if pixel_steps > model.max_pixel_steps:
        raise InvalidRequest(
            f"{count} x {width} x {height} pixels x {steps} steps are {pixel_steps} pixel steps, at most {model.max_pixel_steps} are "
            "allowed: request fewer images, fewer steps or a smaller size"
        )


def _require_sides(width: int | None, height: int | None, model: ModelFolder) -> None:
    """Raises InvalidRequest if the model does not go that far; the request model allows what any model does."""
    for field, side in (("width", width), ("height", height)):
        if side is not None and side > model.max_side:
            raise InvalidRequest(f"{field}: must be at most {model.max_side} with the model {model.name}, got {side}", field=field)


def _refuse_model_that_only_inpaints(model: ModelFolder) -> None:
    if model.only_inpaints:
        raise InvalidRequest(f"the model {model.name} only inpaints: it needs an image and a mask")


def _task(
    kind: Kind,
    parameters: GenerationRequest,
    served: Served,
    width: int,
    height: int,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
) -> Task:
    steps = parameters.num_inference_steps or served.model.defaults.num_inference_steps
    scheduler = parameters.scheduler or served.model.scheduler
    strength = parameters.strength if isinstance(parameters, ImageToImageRequest) else 1.0
    _require_bounded_work(width, height, steps, 1, served.model)
    _require_a_step(steps, strength)
    _require_eta(parameters.eta, scheduler)
    prompt = _read_prompts(parameters, int(steps * strength))
    _require_layers(parameters.clip_skip, served.model)
    task = Task(
        kind=kind,
        prompt=parameters.prompt,
        negative_prompt=parameters.negative_prompt,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=_guidance_scale(parameters, served.model),
        guidance_end=parameters.guidance_end,
        eta=parameters.eta,
        metadata=parameters.metadata,
        seed=random_seed() if parameters.seed is None else parameters.seed,
        scheduler=scheduler,
        safety_check=is_checked(parameters.safety_check, served.policy),
        strength=strength,
        prompt_syntax=parameters.prompt_syntax,
        parts=prompt.parts,
        clip_skip=parameters.clip_skip,
        loras=_chosen_loras(parameters, prompt.lora_tags, served),
        image=image,
        mask=mask,
        image_hash=None if image is None else digest(image),
        mask_hash=None if mask is None else digest(mask),
    )
    return with_previews(task, parameters.preview_every_steps, served.policy)


def _require_a_step(steps: int, strength: float) -> None:
    try:
        require_a_step(steps, strength)
    except ValueError as error:
        raise InvalidRequest(str(error), field="strength") from None


def _require_eta(eta: float, scheduler: str) -> None:
    if eta and not has_eta(scheduler):
        raise InvalidRequest(f"eta: only DDIM and TCD take it, {sampler_of(scheduler)[0]} does not", field="eta")


def _guidance_scale(parameters: GenerationRequest, model: ModelFolder) -> float:
    """Raises InvalidRequest if the model does not allow it."""
    asked, defaults = parameters.guidance_scale, model.defaults
    if asked is None:
        return defaults.guidance_scale
    if asked != defaults.allowed_guidance_scale(asked):
        low, high = defaults.guidance_scale_range
        raise InvalidRequest(
            f"guidance_scale: must be from {low:g} to {high:g} with the model {model.name}, got {asked:g}",
            field="guidance_scale",
        )
    return asked


@dataclass(frozen=True)
class _Prompt:
    """What a prompt says besides its text."""

    parts: int = 1
    lora_tags: tuple[LoraTag, ...] = ()


def _read_prompts(parameters: GenerationRequest, steps: int) -> _Prompt:
    """Check both prompts in their syntax. Raises InvalidRequest, which says at which character something is wrong."""
    if parameters.prompt_syntax == "plain":
        return _Prompt()
    field = "prompt"
    try:
        check(parameters.prompt, steps)
        text, tags = without_lora_tags(parameters.prompt)
        parts = composed(text)
        if len(parts) > MAX_PARTS:
            raise PromptError(f"{len(parts)} parts are joined with AND, at most {MAX_PARTS} are allowed")
        for part, _ in parts:
            _require_few_texts(part, steps)
        field = "negative_prompt"
        check_negative(parameters.negative_prompt, steps)
        _require_few_texts(parameters.negative_prompt, steps)
    except PromptError as error:
        raise InvalidRequest(f"{field}: {error}", field=field) from None
    return _Prompt(len(parts), tags)


def _require_few_texts(prompt: str, steps: int) -> None:
    texts = len({text for _, text in scheduled(prompt, steps)})
    if texts > MAX_TEXTS:
        raise PromptError(f"it changes to {texts} different texts with the steps, at most {MAX_TEXTS} are allowed")


def _require_layers(clip_skip: int, model: ModelFolder) -> None:
    if clip_skip > model.text_layers:
        raise InvalidRequest(
            f"clip_skip: must be at most {model.text_layers} with the model {model.name}, got {clip_skip}",
            field="clip_skip",
        )


def _chosen_loras(parameters: GenerationRequest, tags: Sequence[LoraTag], served: Served) -> tuple[LoraChoice, ...]:
    """The LoRAs of the field and then of the prompt's tags. Those of weight 0 are left out. Raises LoraNotFound, InvalidRequest."""
    asked = [(one.name, one.weight, one.weight) for one in parameters.loras]
    asked += [(tag.name, tag.unet_weight, tag.text_encoder_weight) for tag in tags]
    if not asked:
        return ()
    if len(asked) > MAX_LORAS:
        raise InvalidRequest(f"loras: {len(asked)} are requested, at most {MAX_LORAS} are allowed", field="loras")
    loras = served.loras()
    chosen = [(loras.named(name), unet, text_encoder) for name, unet, text_encoder in asked if unet or text_encoder]
    size_bytes = sum(file.size_bytes for file in {file.name: file for file, *_ in chosen}.values())
    if size_bytes > MAX_LORA_BYTES:
        raise InvalidRequest(f"loras: {size_bytes // 2**20} MiB together, at most {MAX_LORA_BYTES // 2**20} are allowed", field="loras")
    return tuple(LoraChoice(file.name, unet, text_encoder, file.hash, file.size_bytes) for file, unet, text_encoder in chosen)
