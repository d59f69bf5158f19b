"""Parses the parameters of OpenAI's images API into OpenAI's own options and one of our request models.

Does not depend on HTTP, on images or on the loaded model.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from stable_diffusion.core.errors import InvalidRequest, UnknownParameter
from stable_diffusion.core.limits import MAX_IMAGES, MAX_SIDE, MIN_SIDE, SIDE_MULTIPLE, USUAL_MAX_SIDE
from stable_diffusion.core.requests import GenerationRequest, ImageToImageRequest, TextToImageRequest
from stable_diffusion.core.types import ImageFormat
from stable_diffusion.core.validation import validated

_RANDOM_SEED = -1  # as other programs' clients write it
MAX_PARTIAL_IMAGES = 3  # OpenAI's limit
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
# OpenAI has its own parameters for these: `size`, `partial_images`, and `output_format` with another default.
_RENAMED = ("width", "height", "preview_every_steps", "output_format")
# OpenAI's parameters for animations and vector images. They are known so that the refusal can explain itself.
_NOT_OF_STILL_IMAGES = ("frame_duration_ms", "svg", "markup")
_FORMATS_OF_OTHERS = ("gif", "svg")
_STILL = "this server makes one still image (PNG, JPEG or WebP)"
ALIASES = {"steps": "num_inference_steps", "cfg_scale": "guidance_scale"}  # what some clients call our extensions


def _known_size(size: str) -> str:
    if size != "auto" and not _SIZE.fullmatch(size):
        raise ValueError("must be auto or WIDTHxHEIGHT in pixels, such as 512x512")
    return size


def _format_of_still_images(name: Any) -> Any:
    if name in _FORMATS_OF_OTHERS:
        raise ValueError(f"{_STILL}, not {name}")
    return name


def _one_frame(count: int) -> int:
    if count != 1:
        raise ValueError(f"must be 1, {_STILL}")
    return count


class OpenaiParameters(BaseModel):
    """OpenAI's own parameters. The prompt and our extensions are fields of the request models."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str | None = Field(None, description="The served model's name, as GET /v1/models lists it. By default that one.")
    n: int = Field(
        1,
        ge=1,
        le=MAX_IMAGES,
        description="How many images; image i is generated with seed + i. In total at most max_pixel_steps of GET /capabilities: "
        "width x height x num_inference_steps x n.",
    )
    size: Annotated[str, AfterValidator(_known_size)] = Field(
        "auto",
        description=f"WIDTHxHEIGHT, multiples of {SIDE_MULTIPLE} from {MIN_SIDE} to {USUAL_MAX_SIDE}, or {MAX_SIDE} with models for large "
        "images; auto: the native size, or a "
        "size with the input image's proportions.",
        examples=["auto"],
        json_schema_extra={"pattern": f"^(auto|{_SIZE.pattern})$"},
    )
    response_format: Literal["b64_json"] = Field("b64_json", description="Images are sent in the response; there are no URLs.")
    output_format: Annotated[ImageFormat, BeforeValidator(_format_of_still_images)] = Field("png", description="Image format.")
    output_compression: int | None = Field(None, ge=0, le=100, description="The quality of jpeg and webp. By default 95.")
    background: Literal["auto", "opaque"] = Field("auto", description="Images are opaque.")
    frame_count: Annotated[int, AfterValidator(_one_frame)] = Field(
        1, description="Only still images are supported.", json_schema_extra={"const": 1}
    )
    stream: bool = Field(False, description="Respond with server-sent events. For one image only.")
    partial_images: int = Field(
        0, ge=0, le=MAX_PARTIAL_IMAGES, description="With stream: how many previews of the unfinished image to send."
    )
    # The following parameters have no effect. They are accepted because clients send them.
    quality: Any = Field("auto", description="Ignored.")
    style: Any = Field(None, description="Ignored.")
    moderation: Any = Field(None, description="Ignored; see safety_check.")
    input_fidelity: Any = Field(None, description="Ignored; see strength.")
    complexity: Any = Field(None, description="Ignored.")
    user: Any = Field(None, description="Ignored.")
    safety_identifier: Any = Field(None, description="Ignored.")


Parameters = TypeVar("Parameters", bound=GenerationRequest)


def parse_generation(document: dict[str, Any]) -> tuple[OpenaiParameters, TextToImageRequest]:
    """Parse the body of a generation. Raises InvalidRequest, which names an out-of-range size `width` or `height`, an alias by our name."""
    return _parsed(document, TextToImageRequest)


def parse_edit(document: dict[str, Any]) -> tuple[OpenaiParameters, ImageToImageRequest]:
    """Parse the fields of an edit's form except its images, like `parse_generation`."""
    return _parsed(document, ImageToImageRequest)


def generation_fields(model: type[GenerationRequest]) -> list[str]:
    """The fields of our request models that keep their names: the prompt and our extensions."""
    return [name for name in model.model_fields if name not in _RENAMED]


def _parsed(document: dict[str, Any], model: type[Parameters]) -> tuple[OpenaiParameters, Parameters]:
    allowed = [*OpenaiParameters.model_fields, *generation_fields(model), *ALIASES]
    for name, value in document.items():
        if name in _NOT_OF_STILL_IMAGES:
            _refuse_unless_null(name, value)
        elif name not in allowed:
            raise UnknownParameter(f"{name[:60]}: is not a known parameter, allowed are {', '.join(allowed)}", field=name[:60])
    given = _by_our_names({name: value for name, value in document.items() if value is not None})  # OpenAI's null is the default
    asked = validated(OpenaiParameters, {name: value for name, value in given.items() if name in OpenaiParameters.model_fields})
    _check_together(asked)
    if given.get("seed") == _RANDOM_SEED:
        del given["seed"]
    shared = {name: value for name, value in given.items() if name not in OpenaiParameters.model_fields}
    return asked, validated(model, shared | _sides(asked.size))


def _refuse_unless_null(name: str, value: Any) -> None:
    if value is not None:
        raise InvalidRequest(f"{name}: cannot be given, {_STILL}", field=name)


def _by_our_names(given: dict[str, Any]) -> dict[str, Any]:
    for alias, name in ALIASES.items():
        if alias in given and name in given:
            raise InvalidRequest(f"{alias}: is another name of {name}, only one of them can be given", field=alias)
    return {ALIASES.get(name, name): value for name, value in given.items()}


def _check_together(asked: OpenaiParameters) -> None:
    if asked.stream and asked.n > 1:
        raise InvalidRequest(f"n: must be 1 with stream: true, got {asked.n}", field="n")
    if asked.partial_images and not asked.stream:
        raise InvalidRequest("partial_images: must be 0 without stream: true", field="partial_images")
    if asked.output_format == "png" and asked.output_compression not in (None, 100):
        raise InvalidRequest("output_compression: png is lossless, values below 100 need jpeg or webp", field="output_compression")


def _sides(size: str) -> dict[str, int]:
    sides = _SIZE.fullmatch(size)
    return {"width": int(sides[1]), "height": int(sides[2])} if sides else {}


def read_texts(texts: dict[str, str]) -> dict[str, Any]:
    """Convert the fields of a form to JSON values. Empty fields count as not given."""
    return {name: _value(name, text) for name, text in texts.items() if text}


def _value(name: str, text: str) -> Any:
    if name == "loras":
        return _loras(text)
    return _scalar(text) if name in _NUMBERS_AND_FLAGS else text


def _loras(text: str) -> Any:
    """Parse a list that a form holds as JSON. Text that is not JSON stays text, which validation then refuses by name."""
    try:
        return json.loads(text) if len(text) <= _MAX_LORAS_CHARACTERS else text
    except (ValueError, RecursionError):
        return text


def _scalar(text: str) -> int | float | bool | str:
    """Parse a number or a flag as JSON. Anything else stays text, which validation then refuses by name."""
    if len(text) > _MAX_NUMBER_CHARACTERS:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, int | float) else text


_MAX_NUMBER_CHARACTERS = 64  # a longer text could be a megabyte of brackets, which takes half a second to parse
_MAX_LORAS_CHARACTERS = 4096
_NUMBERS_AND_FLAGS = {
    name
    for model in (OpenaiParameters, ImageToImageRequest)
    for name, field in model.model_fields.items()
    if {int, float, bool} & {field.annotation, *get_args(field.annotation)}
} | set(ALIASES)
