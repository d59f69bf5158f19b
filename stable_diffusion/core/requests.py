"""The request models: names, defaults and limits of fields. Every API uses them, and the OpenAPI document is generated from them.

They do not depend on HTTP, on images or on the loaded model. What depends on the model (its native size, its
own steps, guidance and noise scheduler) stays None here; `api/tasks.py` resolves it.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

import ftfy
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from stable_diffusion.core.limits import (
    MAX_CLIP_SKIP,
    MAX_GUIDANCE_SCALE,
    MAX_LORA_WEIGHT,
    MAX_LORAS,
    MAX_PROMPT_CHARACTERS,
    MAX_PROMPT_CHUNKS,
    MAX_STEPS,
    SEED_LIMIT,
)
from stable_diffusion.core.schedulers import SCHEDULERS, known_scheduler
from stable_diffusion.core.validation import BLANK_PROMPTS, Side, validated


def _clean_text(text: str) -> str:
    """Repair broken Unicode and unescape entities as CLIP's original tokenizer did; strip surrounding white space."""
    cleaned: str = ftfy.fix_text(text)
    return cleaned.strip()


def _not_blank(text: str, info: ValidationInfo) -> str:
    if not text and not (info.context or {}).get(BLANK_PROMPTS):
        raise ValueError("must not be empty")
    return text


Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS), AfterValidator(_clean_text)]


class LoraRequest(BaseModel):
    """One LoRA of a request, by the name of its file."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    name: str = Field(min_length=1, max_length=200, description="A name from GET /capabilities.")
    weight: float = Field(1.0, ge=-MAX_LORA_WEIGHT, le=MAX_LORA_WEIGHT, description="How strongly it changes the image. 0: not at all.")


class GenerationRequest(BaseModel):
    """The fields that all kinds of request share."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    prompt: Annotated[Prompt, AfterValidator(_not_blank)] = Field(
        description=f"What to generate. At most {MAX_PROMPT_CHUNKS * 75} tokens of the model; a token is about four characters.",
        examples=["a small red circle on a blue background"],
    )
    negative_prompt: Prompt = Field("", description="What to avoid. Used when guidance_scale is above 1.")
    height: Side = Field(None, description="Height in pixels. By default the model's native height, or derived from the input image.")
    width: Side = Field(None, description="Width in pixels. By default the model's native width, or derived from the input image.")
    num_inference_steps: int | None = Field(
        None, ge=1, le=MAX_STEPS, description="Denoising steps. By default the model's own number (GET /capabilities), usually 50."
    )
    guidance_scale: float | None = Field(
        None,
        ge=0,
        le=MAX_GUIDANCE_SCALE,
        description="How closely to follow the prompt. 1 or less: no guidance, half the work. By default the model's own, usually 7.5; a "
        "model may allow a smaller range (GET /capabilities).",
    )
    guidance_end: float = Field(
        1.0,
        ge=0,
        le=1,
        description="The fraction of the steps that use guidance. Each later step takes half the work. Values below 1 change the image.",
    )
    preview_every_steps: int = Field(
        0,
        ge=0,
        le=MAX_STEPS,
        description="With Accept: text/event-stream, send a coarse preview after every so many steps. 0: none.",
    )
    seed: int | None = Field(
        None,
        ge=0,
        lt=SEED_LIMIT,
        description="The same seed gives the same image. By default random; the response header `seed` has the value.",
    )
    scheduler: Annotated[str, AfterValidator(known_scheduler)] | None = Field(
        None,
        description="Noise scheduler: "
        + ", ".join(short_names[0] for short_names in SCHEDULERS.values())
        + ", or diffusers' class name. By default the model's own.",
        examples=[short_names[0] for short_names in SCHEDULERS.values()],
    )
    eta: float = Field(
        0.0, ge=0, le=1, description="How much noise each step adds. 0: none, 1: as much as in training. Only DDIM and TCD use it."
    )
    prompt_syntax: Literal["plain", "a1111"] = Field(
        "plain",
        description="How prompts are read. plain: every character is text. a1111: (word:1.2), [word], BREAK, AND, [from:to:0.5], "
        "[one|other] and <lora:name:0.8>, as in A1111.",
    )
    clip_skip: int = Field(
        1,
        ge=1,
        le=MAX_CLIP_SKIP,
        description="The text encoder's layer to use. 1: that which the model is made for, 2: the one before.",
    )
    loras: list[LoraRequest] = Field([], max_length=MAX_LORAS, description="LoRAs to apply, each with its weight.")
    safety_check: bool | None = Field(
        None,
        description="Whether the safety checker checks this image, if the model has one. By default the server's policy decides "
        "(GET /capabilities); if it is always, false is refused.",
    )
    output_format: Literal["jpeg", "png", "webp"] | None = Field(
        None, description="Image format of the response. By default the format that the Accept header prefers, else jpeg."
    )
    metadata: bool = Field(
        True, description="Write the generation parameters into the image file, as A1111 does. POST /reproduce reads them."
    )


class TextToImageRequest(GenerationRequest):
    """The body of POST /txt2img."""


class ImageToImageRequest(GenerationRequest):
    """The `data` part of POST /img2img and POST /inpaint."""

    strength: float = Field(
        0.8,
        gt=0,
        le=1,
        description="How far to depart from the input image. num_inference_steps * strength steps are run, which must be at least one.",
    )

    @model_validator(mode="after")
    def _some_step_is_left(self) -> ImageToImageRequest:
        if self.num_inference_steps is not None:
            require_a_step(self.num_inference_steps, self.strength)
        return self


def require_a_step(steps: int, strength: float) -> None:
    """Raises ValueError if `strength` leaves none of the steps."""
    if int(steps * strength) < 1:
        raise ValueError(f"strength {strength} leaves no step to run out of {steps}: raise strength or num_inference_steps")


class ReproductionRequest(BaseModel):
    """The `data` part of POST /reproduce."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    dry_run: bool = Field(False, description="Only report, as JSON, what would be generated and what would differ.")
    output_format: Literal["jpeg", "png", "webp"] | None = Field(
        None, description="Image format of the response. By default the format that the Accept header prefers, else jpeg."
    )
    metadata: bool = Field(True, description="Write the generation parameters into the image file.")


def random_seed() -> int:
    return secrets.randbelow(SEED_LIMIT)


def parse_text_to_image(document: dict[str, Any], *, blank_prompts: bool = False) -> TextToImageRequest:
    return validated(TextToImageRequest, document, blank_prompts=blank_prompts)


def parse_image_to_image(document: dict[str, Any], *, blank_prompts: bool = False) -> ImageToImageRequest:
    return validated(ImageToImageRequest, document, blank_prompts=blank_prompts)


def parse_reproduction(document: dict[str, Any]) -> ReproductionRequest:
    return validated(ReproductionRequest, document)
