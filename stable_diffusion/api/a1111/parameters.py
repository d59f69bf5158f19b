"""Parses A1111's bodies into our request models: the names, defaults and types of its fields. Limits are in `core/limits.py`.

Does not depend on HTTP, on images or on the loaded model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field

from stable_diffusion.core.errors import FieldError, InvalidRequest, NotFound
from stable_diffusion.core.limits import MAX_IMAGES, MAX_SIDE, MAX_STEPS, MIN_SIDE, SEED_LIMIT, SIDE_MULTIPLE, USUAL_MAX_SIDE
from stable_diffusion.core.requests import (
    GenerationRequest,
    ImageToImageRequest,
    TextToImageRequest,
    parse_image_to_image,
    parse_text_to_image,
)
from stable_diffusion.core.schedulers import SCHEDULERS, has_eta, known_schedule, sampler_of, scheduler_of
from stable_diffusion.core.validation import validated
from stable_diffusion.models.defaults import Defaults
from stable_diffusion.models.folder import ModelFolder

MAX_NAMES = 1024  # of an object; the complete options of A1111 have about 400
MAX_MASK_BLUR = 64
_GUIDANCE_SCALE = 7.0  # A1111's default

# Our field names, which errors contain -> A1111's.
A1111_NAMES = {
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "strength": "denoising_strength",
    "scheduler": "sampler_name",
    "clip_skip": "CLIP_stop_at_last_layers",
}
_OUR_NAMES = re.compile(rf"\b({'|'.join(A1111_NAMES)})\b")

_SIDE = f"Rounded down to a multiple of {SIDE_MULTIPLE}; {MIN_SIDE} to {USUAL_MAX_SIDE}, or {MAX_SIDE} with models for large images."
_WITHOUT_EFFECT = "Has no effect."
# Report only the first wrong item: a list may have thousands.
_Texts = Annotated[list[str], FailFast()]


class Options(BaseModel):
    """The A1111 options that this server reads."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    sd_model_checkpoint: str | None = Field(None, description="The title or model_name of the served model; any other is refused.")
    sd_vae: str | None = Field(
        None,
        description="The autoencoder: Automatic, or the name from /sdapi/v1/sd-vae, or None if that lists none; any other is refused.",
    )
    enable_pnginfo: bool | None = Field(None, description="In override_settings, false: the file gets no infotext.")
    CLIP_stop_at_last_layers: int | None = Field(
        None,
        description="In override_settings: the clip_skip of this request. By default 1. Stable Diffusion XL never "
        "uses the last layer, so 1 and 2 are the same there.",
    )


_NO_OPTIONS = Options(sd_model_checkpoint=None, sd_vae=None, enable_pnginfo=None, CLIP_stop_at_last_layers=None)


class GenerationBody(BaseModel):
    """The fields of both bodies. Unknown fields are ignored; null counts as a missing field."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, frozen=True)

    prompt: str = Field("", description="What to generate.")
    negative_prompt: str = Field("", description="What to avoid.")
    seed: int = Field(-1, description="-1: random. Image i is generated with seed + i, modulo 2^32; `info` says which seeds were used.")
    sampler_name: str = Field("", description="A name from /sdapi/v1/samplers. By default the model's own.")
    sampler_index: str = Field("", description="Alias of sampler_name.")
    scheduler: str = Field(
        "",
        description="Noise levels: a name or label from /sdapi/v1/schedulers. A sampler without them uses its own.",
    )
    steps: int | None = Field(None, description=f"Denoising steps, 1 to {MAX_STEPS}. By default the model's own number, usually 50.")
    cfg_scale: float | None = Field(
        None,
        description="How closely to follow the prompt, 0 to 30. By default 7, or the model's own default. An unsupported value is "
        "replaced by the nearest supported one.",
    )
    eta: float = Field(0.0, description="How much noise each step adds, 0 to 1. Only the samplers DDIM and TCD use it.")
    width: int | None = Field(None, description=f"{_SIDE} By default the model's native width, or one that follows from the input image.")
    height: int | None = Field(None, description=f"{_SIDE} By default the model's native height, or one that follows from the input image.")
    batch_size: int = Field(
        1,
        ge=1,
        le=MAX_IMAGES,
        description=f"batch_size * n_iter images are generated, at most {MAX_IMAGES}, and in total at most max_pixel_steps of "
        "GET /capabilities: width * height * steps * images.",
    )
    n_iter: int = Field(1, ge=1, le=MAX_IMAGES, description="See batch_size.")
    override_settings: Options = Field(
        _NO_OPTIONS, description="Only sd_model_checkpoint, sd_vae, enable_pnginfo and CLIP_stop_at_last_layers are read."
    )
    send_images: bool = Field(True, description="false: the response has no images.")
    alwayson_scripts: dict[str, Any] = Field(
        {}, description="Scripts are not supported: a name is refused unless its args are empty or disabled."
    )
    script_name: str = Field("", description="Scripts are not supported: any name is refused.")
    infotext: str = Field("", description="Refused: use POST /reproduce to generate an image again.")
    restore_faces: bool = Field(False, description=_WITHOUT_EFFECT)
    tiling: bool = Field(False, description=_WITHOUT_EFFECT)
    save_images: bool = Field(False, description="Has no effect: nothing is saved on the server.")
    styles: _Texts = Field([], description=_WITHOUT_EFFECT)


class TextToImageBody(GenerationBody):
    """The body of POST /sdapi/v1/txt2img."""

    enable_hr: bool = Field(False, description="A second pass at a larger size is not supported: true is refused.")


class ImageToImageBody(GenerationBody):
    """The body of POST /sdapi/v1/img2img."""

    init_images: _Texts = Field([], description="One PNG, JPEG or WebP in base64, with or without the prefix of a data URL.")
    mask: str = Field(
        "",
        description="A mask in base64 with the image's proportions: white is repainted, black is kept, grey blends. If it has "
        "transparency, the opaque area is repainted instead.",
    )
    mask_blur: float = Field(
        4, ge=0, le=MAX_MASK_BLUR, description="Blur of the mask's edge: the standard deviation in pixels of the mask."
    )
    inpainting_mask_invert: int = Field(0, description="1: black is repainted instead of white.")
    inpainting_fill: int = Field(
        0, ge=0, le=3, description="Initial content of the repainted area. Every value acts as 1, original: the image itself."
    )
    inpaint_full_res: bool = Field(True, description="Has no effect: the whole image is generated.")
    resize_mode: int = Field(
        0, ge=0, le=3, description="0: stretch, 1: scale and crop, 2: scale and continue the edges. 3, in latent space, is refused."
    )
    denoising_strength: float = Field(0.75, description="How far to depart from the image, 0 to 1. 0: the image itself, resized.")
    include_init_images: bool = Field(False, description="true: `parameters` in the response contains the images that were sent.")


class PngInfoBody(BaseModel):
    """The body of POST /sdapi/v1/png-info."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    image: str = Field(description="One PNG, JPEG or WebP in base64, with or without the prefix of a data URL.")


Body = TypeVar("Body", bound=GenerationBody)
Parameters = TypeVar("Parameters", bound=GenerationRequest)
Made = TypeVar("Made")


@dataclass(frozen=True)
class Asked(Generic[Body, Parameters]):
    """A request for `count` images, the first one with `parameters`. `body` contains the rest in A1111's terms."""

    body: Body
    parameters: Parameters
    count: int


def read_text_to_image(document: dict[str, Any]) -> Asked[TextToImageBody, TextToImageRequest]:
    """Parse the body of txt2img. Raises InvalidRequest, or NotFound for an unknown sampler."""
    body = _typed(TextToImageBody, document)
    if body.enable_hr:
        raise InvalidRequest("enable_hr: a second pass at a larger size is not supported, send false", field="enable_hr")
    fields = _fields(body)
    return Asked(body, in_a1111_words(lambda: parse_text_to_image(fields, blank_prompts=True)), _count(body))


def read_image_to_image(document: dict[str, Any]) -> Asked[ImageToImageBody, ImageToImageRequest]:
    """Parse the body of img2img. Raises InvalidRequest, or NotFound for an unknown sampler or a missing image."""
    body = _typed(ImageToImageBody, document)
    if not body.init_images:
        raise NotFound("init_images: the image is missing, send one in base64", field="init_images")
    if len(body.init_images) > 1:
        raise InvalidRequest(f"init_images: must hold one image, got {len(body.init_images)}", field="init_images")
    if body.resize_mode == 3:
        raise InvalidRequest("resize_mode: must be 0, 1 or 2, got 3 (resizing in latent space is not supported)", field="resize_mode")
    # At strength 0 nothing is generated, so the field's own limit does not apply.
    fields = {**_fields(body), "strength": body.denoising_strength or 1.0}
    return Asked(body, in_a1111_words(lambda: parse_image_to_image(fields, blank_prompts=True)), _count(body))


def without_images(body: ImageToImageBody) -> ImageToImageBody:
    """The body without its images, unless the response repeats them. This frees tens of megabytes."""
    return body if body.include_init_images else body.model_copy(update={"init_images": [], "mask": ""})


def read_options(document: dict[str, Any]) -> Options:
    """Parse the body of POST /sdapi/v1/options. Raises InvalidRequest."""
    return validated(Options, document)


def read_png_info(document: dict[str, Any]) -> PngInfoBody:
    """Parse the body of POST /sdapi/v1/png-info. Raises InvalidRequest."""
    return validated(PngInfoBody, document)


def _typed(model: type[Body], document: dict[str, Any]) -> Body:
    body = validated(model, {name: value for name, value in document.items() if value is not None})
    if body.infotext:
        raise InvalidRequest("infotext: is not supported, use POST /reproduce", field="infotext")
    if body.script_name:
        raise InvalidRequest(f"script_name: scripts are not supported, got {body.script_name[:60]!r}", field="script_name")
    for name, script in body.alwayson_scripts.items():
        if not _does_nothing(script):
            raise InvalidRequest(f"alwayson_scripts: scripts are not supported, got {name[:60]!r}", field="alwayson_scripts")
    return body


def _does_nothing(script: Any) -> bool:
    """Whether a script has no units, or only disabled ones. Clients send such scripts with every request."""
    units = script.get("args", []) if isinstance(script, dict) else script
    return isinstance(units, list) and all(not unit or (isinstance(unit, dict) and unit.get("enabled") is False) for unit in units)


def _count(body: GenerationBody) -> int:
    count = body.batch_size * body.n_iter
    if count > MAX_IMAGES:
        raise InvalidRequest(f"batch_size: batch_size * n_iter must be at most {MAX_IMAGES}, got {count}", field="batch_size")
    return count


def _fields(body: GenerationBody) -> dict[str, Any]:
    scheduler = scheduler_asked_for(body.sampler_name or body.sampler_index, body.scheduler)
    return {
        "prompt": body.prompt,
        "negative_prompt": body.negative_prompt,
        "width": _rounded_down(body.width),
        "height": _rounded_down(body.height),
        "num_inference_steps": body.steps,
        "guidance_scale": body.cfg_scale,
        "eta": body.eta if scheduler is not None and has_eta(scheduler) else 0.0,
        "seed": asked_seed(body),
        "scheduler": scheduler,
        "metadata": body.override_settings.enable_pnginfo is not False,
        "prompt_syntax": "a1111",
        "clip_skip": body.override_settings.CLIP_stop_at_last_layers or 1,
    }


def asked_seed(body: GenerationBody) -> int | None:
    """The first image's seed; None: random. Larger seeds than ours, which A1111's clients make up, are taken modulo 2^32."""
    return None if body.seed == -1 else body.seed % SEED_LIMIT


def _rounded_down(side: int | None) -> int | None:
    return None if side is None else side - side % SIDE_MULTIPLE


def scheduler_asked_for(sampler: str, schedule: str) -> str | None:
    """Our noise scheduler for A1111's sampler and noise levels; None: the model's own. A sampler without these levels keeps its own.

    If no sampler is named, noise levels other than the usual ones select the first sampler that has them.
    Raises NotFound for an unknown sampler, InvalidRequest for unknown noise levels.
    """
    try:
        levels = known_schedule(schedule)
    except ValueError as error:
        raise InvalidRequest(f"scheduler: {error}", field="scheduler") from None
    if not sampler:
        return None if levels is None else next(one for one in SCHEDULERS if sampler_of(one)[1] == levels)
    try:
        return scheduler_of(sampler, schedule)[0]
    except ValueError as error:
        raise NotFound(f"sampler_name: {error}", field="sampler_name") from None


def fitted_to_model(asked: Asked[Body, Parameters], model: ModelFolder) -> Asked[Body, Parameters]:
    """The same request in the terms of `model`: with a guidance scale that it supports, and CLIP skip counted as ours.

    A1111's clients send guidance scale 7 to every model. A request without one gets A1111's default, 7, unless the model has its own.
    """
    clip_skip = asked.parameters.clip_skip
    if model.is_xl:
        clip_skip = max(1, clip_skip - 1)  # A1111's 2 is the layer that the model is made for
    scale = asked.parameters.guidance_scale
    if scale is None and model.defaults.guidance_scale == Defaults.guidance_scale:
        scale = _GUIDANCE_SCALE
    if scale is not None:
        scale = model.defaults.allowed_guidance_scale(scale)
    return replace(asked, parameters=asked.parameters.model_copy(update={"guidance_scale": scale, "clip_skip": clip_skip}))


def missing_schedule(body: GenerationBody, scheduler: str) -> str | None:
    """The noise levels that `body` asks for, if `scheduler`, which was used, does not support them."""
    levels = known_schedule(body.scheduler)
    return levels if levels != sampler_of(scheduler)[1] else None


def in_a1111_words(work: Callable[[], Made]) -> Made:
    """The result of `work`. An InvalidRequest that it raises names A1111's fields."""
    try:
        return work()
    except InvalidRequest as error:
        problems = [FieldError(problem.field and _renamed(problem.field), _renamed(problem.message)) for problem in error.problems]
        raise InvalidRequest(_renamed(error.message), problems=problems) from None


def _renamed(text: str) -> str:
    return _OUR_NAMES.sub(lambda match: A1111_NAMES[match.group()], text)
