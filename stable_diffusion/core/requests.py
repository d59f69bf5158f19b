"""The request models: names, defaults and limits of fields. Every API uses them, and the OpenAPI document is generated from them.

They do not depend on HTTP, on images or on the loaded model. What depends on the model (its native size, its
own steps, guidance and noise scheduler) stays None here; `api/tasks.py` resolves it.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal, TypeVar

import ftfy
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from stable_diffusion.core.errors import FieldError, InvalidRequest
from stable_diffusion.core.limits import (
    MAX_CLIP_SKIP,
    MAX_GUIDANCE_SCALE,
    MAX_LORA_WEIGHT,
    MAX_LORAS,
    MAX_PROMPT_CHARACTERS,
    MAX_PROMPT_CHUNKS,
    MAX_SIDE,
    MAX_STEPS,
    MIN_SIDE,
    SEED_LIMIT,
    SIDE_MULTIPLE,
)
from stable_diffusion.core.schedulers import SCHEDULERS, known_scheduler

_MAX_PROBLEMS = 20  # reported per request
_BLANK_PROMPTS = "blank prompts are allowed"


def _clean_text(text: str) -> str:
    """Repair broken Unicode and unescape entities as CLIP's original tokenizer did; strip surrounding white space."""
    cleaned: str = ftfy.fix_text(text)
    return cleaned.strip()


def _not_blank(text: str, info: ValidationInfo) -> str:
    if not text and not (info.context or {}).get(_BLANK_PROMPTS):
        raise ValueError("must not be empty")
    return text


def _whole_blocks(side: int | None) -> int | None:
    if side is not None and side % SIDE_MULTIPLE:
        raise ValueError(f"must be a multiple of {SIDE_MULTIPLE}, {side} is not")
    return side


Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS), AfterValidator(_clean_text)]
Side = Annotated[
    int | None,
    Field(ge=MIN_SIDE, le=MAX_SIDE, json_schema_extra={"multipleOf": SIDE_MULTIPLE}),
    AfterValidator(_whole_blocks),
]


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


Model = TypeVar("Model", bound=BaseModel)


def random_seed() -> int:
    return secrets.randbelow(SEED_LIMIT)


def parse_text_to_image(document: dict[str, Any], *, blank_prompts: bool = False) -> TextToImageRequest:
    return validated(TextToImageRequest, document, blank_prompts=blank_prompts)


def parse_image_to_image(document: dict[str, Any], *, blank_prompts: bool = False) -> ImageToImageRequest:
    return validated(ImageToImageRequest, document, blank_prompts=blank_prompts)


def parse_reproduction(document: dict[str, Any]) -> ReproductionRequest:
    return validated(ReproductionRequest, document)


def validated(model: type[Model], document: dict[str, Any], *, blank_prompts: bool = False) -> Model:
    """Validate `document`. Raises InvalidRequest, which names each wrong field and what is allowed."""
    try:
        return model.model_validate(document, context={_BLANK_PROMPTS: blank_prompts})
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)[:_MAX_PROBLEMS]
        problems = [_problem(detail, model) for detail in details]
        message = "; ".join(problem.message for problem in problems[:5])
        raise InvalidRequest(message, problems=problems) from None


def _problem(detail: Any, model: type[BaseModel]) -> FieldError:
    """Describe a pydantic error in words that name the field and the limit."""
    # Errors of whole-model validators have no location. The only such validator concerns strength.
    is_about_strength = detail["type"] == "value_error" and not detail["loc"]
    field = "strength" if is_about_strength else str(next(iter(detail["loc"]), "body"))[:60]
    context = detail.get("ctx", {})
    match detail["type"]:
        case "missing":
            reason = "is required"
        case "extra_forbidden":
            reason = f"is not a known field, allowed are {', '.join(model.model_fields)}"
        case "value_error":
            reason = str(context["error"])
        case "literal_error":
            reason = f"must be one of {context['expected']}"
        case "string_too_long":
            reason = f"must have at most {context['max_length']} characters"
        case _:
            reason = detail["msg"][:1].lower() + detail["msg"][1:]
            reason = reason.removeprefix("input ").removeprefix("should").strip()
            reason = f"must {reason}" if not reason.startswith("must") else reason
    return FieldError(field, reason if is_about_strength else f"{field}: {reason}")
