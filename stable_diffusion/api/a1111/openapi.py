"""A1111's API in the OpenAPI document, generated from the models that parse its bodies."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from stable_diffusion.api.a1111.parameters import A1111_NAMES, ImageToImageBody, Options, PngInfoBody, TextToImageBody
from stable_diffusion.api.a1111.responses import (
    EMPTY_LISTS,
    UPSCALERS,
    A1111Error,
    A1111Model,
    A1111Pictures,
    A1111PngInfo,
    A1111Progress,
    A1111Sampler,
    A1111Scheduler,
    A1111ServedOptions,
    A1111Upscaler,
    A1111Vae,
    samplers_response,
    schedules_response,
)
from stable_diffusion.api.openapi import IDEMPOTENCY_KEY, LOAD_ERRORS, TIMEOUT_PARAMETER, errors, json_content, json_response, operation
from stable_diffusion.core.requests import ImageToImageRequest

TAG = {"name": "a1111", "description": "A1111's API, for its clients. Unknown fields are ignored; null counts as a missing field."}
_REFERENCES = "#/components/schemas/A1111{model}"
_EXAMPLE = {"prompt": "a small red circle on a blue background", "steps": 20, "sampler_name": "Euler a", "seed": 1, "batch_size": 2}
# A grey image of 8 x 8 pixels.
_EXAMPLE_IMAGE = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFUlEQVR42mNsaGhgwAaYGHCAwSkBADAXAZDUexXGAAAAAElFTkSuQmCC"
_READING_ERRORS = {
    "403": "A browser sent the request from a page of another site.",
    "404": "The sampler or model is unknown, or the image is missing.",
    "408": "The body stalled or arrived too slowly; the connection is closed.",
    "413": "The body or an image is too large.",
    "415": "The body is not JSON.",
    "422": "A field is malformed, out of range or not supported, or the Idempotency-Key was used for another request.",
}
_GENERATION_ERRORS = {
    **_READING_ERRORS,
    "499": "The job was cancelled, by /sdapi/v1/interrupt for example.",
    "500": "Generation failed.",
    **LOAD_ERRORS,
}
_DEFECT = "An internal error."
_JOB_ERRORS = {"500": _DEFECT, "503": "The state of the jobs cannot be read."}


def paths() -> dict[str, Any]:
    with_image = {**_EXAMPLE, "init_images": [_EXAMPLE_IMAGE], "denoising_strength": 0.75}
    unreadable = {"400": "An image is not base64, is damaged, or is not PNG, JPEG or WebP."}
    set_options = json_response("Accepted.", type(None))
    progress = json_response("An idle server reports exactly progress 0 and job_count 0.", A1111Progress)
    interrupted = json_response("The jobs end before their next step.", dict[str, Any])
    return {
        "/sdapi/v1/txt2img": {"post": _generates("Txt2img", "Generate images from text", _body(TextToImageBody, _EXAMPLE), {})},
        "/sdapi/v1/img2img": {
            "post": _generates(
                "Img2img", "Generate from an image, or repaint its masked area", _body(ImageToImageBody, with_image), unreadable
            )
        },
        "/sdapi/v1/options": {
            "get": _gets("Options", "The options, which name the served model", "The options.", A1111ServedOptions),
            "post": _operation(
                "SetOptions",
                "Select a model: accepted only if it is the served one",
                set_options,
                _READING_ERRORS,
                requestBody=_body(Options, {"sd_model_checkpoint": "demo"}),
            ),
        },
        "/sdapi/v1/sd-models": {"get": _gets("Models", "The one model that is served", "The model.", list[A1111Model])},
        "/sdapi/v1/sd-vae": {
            "get": _gets("Vaes", "The autoencoder that replaces the model's own (SD_VAE)", "At most one.", list[A1111Vae])
        },
        "/sdapi/v1/samplers": {"get": _gets("Samplers", "The samplers", "The samplers.", list[A1111Sampler], samplers_response())},
        "/sdapi/v1/schedulers": {
            "get": _gets("Schedulers", "The noise levels", "The noise levels.", list[A1111Scheduler], schedules_response())
        },
        "/sdapi/v1/upscalers": {"get": _gets("Upscalers", "No upscalers", "None.", list[A1111Upscaler], UPSCALERS)},
        "/sdapi/v1/progress": {"get": _operation("Progress", "Progress of the caller's own jobs", progress, _JOB_ERRORS)},
        "/sdapi/v1/interrupt": {"post": _operation("Interrupt", "Cancel the caller's own jobs", interrupted, _JOB_ERRORS)},
        "/sdapi/v1/skip": {"post": _operation("Skip", "Cancel the caller's oldest job", interrupted, _JOB_ERRORS)},
        "/sdapi/v1/refresh-checkpoints": {"post": _gets("RefreshCheckpoints", "Does nothing: one model is served", "null.", type(None))},
        "/sdapi/v1/png-info": {
            "post": _operation(
                "PngInfo",
                "The infotext in an image's file",
                json_response("The infotext.", A1111PngInfo),
                {**unreadable, **_READING_ERRORS},
                requestBody=_body(PngInfoBody, {"image": _EXAMPLE_IMAGE}),
            )
        },
        **{
            path: {"get": _gets(_last_words(path), "Empty, for clients that request it at start", "Empty.", _kind(content))}
            for path, content in EMPTY_LISTS.items()
        },
    }


def schemas() -> dict[str, Any]:
    return {f"A1111{model.__name__}": _schema(model) for model in (TextToImageBody, ImageToImageBody, Options, PngInfoBody)}


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    """The schema of a body, in which every field may also be null."""
    schema = model.model_json_schema(ref_template=_REFERENCES)
    schema.pop("$defs", None)
    schema["description"] = schema["description"].splitlines()[0]
    for name, field in schema["properties"].items():
        described = {key: field.pop(key) for key in ("description", "default", "title") if key in field}
        kinds = [kind for kind in field.get("anyOf", [field]) if kind != {"type": "null"}]
        kinds[0] |= _LIMITS.get(name, {})
        schema["properties"][name] = {"anyOf": [*kinds, {"type": "null"}], **described}
    return schema


def _limits() -> dict[str, dict[str, Any]]:
    """The limits of our fields, by A1111's names. Sides are rounded, seeds have none, and at strength 0 nothing is generated."""
    limits = {}
    for name, field in ImageToImageRequest.model_json_schema()["properties"].items():
        numbers = field.get("anyOf", [field])[0]
        limits[A1111_NAMES.get(name, name)] = {key: numbers[key] for key in _LIMIT_KEYS if key in numbers}
    del limits["seed"]
    limits["denoising_strength"] = {"minimum": 0, "maximum": 1}
    return limits


_LIMIT_KEYS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_LIMITS = _limits()


def _generates(name: str, summary: str, body: dict[str, Any], failures: dict[str, str]) -> dict[str, Any]:
    response, failures = json_response("The images.", A1111Pictures), {**failures, **_GENERATION_ERRORS}
    return _operation(name, summary, response, failures, parameters=[IDEMPOTENCY_KEY, TIMEOUT_PARAMETER], requestBody=body)


def _gets(name: str, summary: str, description: str, model: Any, example: Any = None) -> dict[str, Any]:
    response = json_response(description, model, **({} if example is None else {"example": example}))
    return _operation(name, summary, response, {"500": _DEFECT})


def _operation(name: str, summary: str, response: dict[str, Any], failures: dict[str, str], **more: Any) -> dict[str, Any]:
    return operation(TAG, f"a1111{name}", summary, {"200": response, **errors(failures, A1111Error)}, **more)


def _body(model: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": json_content({"$ref": _REFERENCES.format(model=model.__name__)}, example=example)}


def _kind(content: Any) -> Any:
    return list[dict[str, Any]] if isinstance(content, list) else dict[str, Any]


def _last_words(path: str) -> str:
    return "".join(word.capitalize() for word in path.rpartition("/")[2].split("-"))
