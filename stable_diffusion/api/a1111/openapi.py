"""A1111's API in the OpenAPI document, generated from the models that parse its bodies."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from stable_diffusion.api.a1111.parameters import A1111_NAMES, ImageToImageBody, Options, TextToImageBody
from stable_diffusion.api.a1111.responses import EMPTY_LISTS, UPSCALERS, samplers_response, schedules_response
from stable_diffusion.api.openapi import LOAD_ERRORS, TIMEOUT_PARAMETER
from stable_diffusion.core.requests import ImageToImageRequest

TAG = {"name": "a1111", "description": "A1111's API, for its clients. Unknown fields are ignored, null is as good as a missing field."}
_REFERENCES = "#/components/schemas/A1111{model}"
_MODELS: tuple[type[BaseModel], ...] = (TextToImageBody, ImageToImageBody, Options)
_EXAMPLE = {"prompt": "a small red circle on a blue background", "steps": 20, "sampler_name": "Euler a", "seed": 1, "batch_size": 2}
# A grey image of 8 x 8 pixels.
_EXAMPLE_PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFUlEQVR42mNsaGhgwAaYGHCAwSkBADAXAZDUexXGAAAAAElFTkSuQmCC"
_READING_ERRORS = {
    "403": "A page of another site sent it, in a browser.",
    "404": "No such sampler or model, or the picture is missing.",
    "408": "The body stalled or came too slowly; the connection is closed.",
    "413": "The body or a picture is too large.",
    "415": "The body is not JSON.",
    "422": "A field is malformed, out of range or asks for what is not supported.",
}
_DRAWING_ERRORS = {
    **_READING_ERRORS,
    "499": "The job was cancelled, by /sdapi/v1/interrupt for example.",
    "500": "The picture could not be computed.",
    **LOAD_ERRORS,
}


def paths() -> dict[str, Any]:
    return {
        "/sdapi/v1/txt2img": {"post": _draws("a1111Txt2img", "Draw pictures from text", TextToImageBody, _EXAMPLE, _DRAWING_ERRORS)},
        "/sdapi/v1/img2img": {
            "post": _draws(
                "a1111Img2img",
                "Redraw a picture, or with a mask repaint a part of it",
                ImageToImageBody,
                {**_EXAMPLE, "init_images": [_EXAMPLE_PICTURE], "denoising_strength": 0.75},
                {"400": "A picture is no base64, damaged or no PNG, JPEG or WebP.", **_DRAWING_ERRORS},
            )
        },
        "/sdapi/v1/options": {
            "get": _gets("a1111Options", "The options: which model is served", _object("The options.", ["sd_model_checkpoint"])),
            "post": {
                **_described("a1111SetOptions", "Ask for a model: accepted if it is the served one"),
                "requestBody": _body(Options, {"sd_model_checkpoint": "demo"}),
                "responses": {"200": _json("Accepted.", {"type": "null"}), **_errors(_READING_ERRORS)},
            },
        },
        "/sdapi/v1/sd-models": {"get": _gets("a1111Models", "The one model that is served", _list("The model."))},
        "/sdapi/v1/samplers": {"get": _gets("a1111Samplers", "The samplers", _list("The samplers.", samplers_response()))},
        "/sdapi/v1/schedulers": {"get": _gets("a1111Schedulers", "The noise levels", _list("The noise levels.", schedules_response()))},
        "/sdapi/v1/upscalers": {"get": _gets("a1111Upscalers", "No upscalers", _list("None.", UPSCALERS))},
        "/sdapi/v1/progress": {
            "get": _asks_for_jobs(
                "a1111Progress",
                "How far the caller's own jobs are",
                _object("Idle is exactly progress 0 and job_count 0.", ["progress", "eta_relative", "state", "current_image"]),
            )
        },
        "/sdapi/v1/interrupt": {
            "post": _asks_for_jobs("a1111Interrupt", "Cancel the caller's own jobs", _object("They are ended before their next step."))
        },
        **{
            path: {"get": _gets(f"a1111{_last_words(path)}", "Empty, for clients that ask at start", _empty(content))}
            for path, content in EMPTY_LISTS.items()
        },
    }


def schemas() -> dict[str, Any]:
    return {f"A1111{model.__name__}": _schema(model) for model in _MODELS} | {
        "A1111Pictures": _PICTURES_SCHEMA,
        "A1111Error": _ERROR_SCHEMA,
    }


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
    """The limits of our fields, by A1111's names. Sides are rounded, and -1 is also a valid seed."""
    limits = {}
    for name, field in ImageToImageRequest.model_json_schema()["properties"].items():
        numbers = field.get("anyOf", [field])[0]
        limits[A1111_NAMES.get(name, name)] = {key: numbers[key] for key in _LIMIT_KEYS if key in numbers}
    limits["seed"]["minimum"] = -1
    return limits


_LIMIT_KEYS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_LIMITS = _limits()

_PICTURES_SCHEMA = {
    "type": "object",
    "required": ["images", "parameters", "info"],
    "properties": {
        "images": {"type": "array", "items": {"type": "string"}, "description": "PNG in base64, with the infotext as `parameters`."},
        "parameters": {"type": "object", "description": "The request's known fields with their defaults."},
        "info": {"type": "string", "description": "JSON of what was drawn: all_seeds, width, height, infotexts, ..."},
    },
}
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error", "detail", "body", "errors"],
    "properties": {
        "error": {"type": "string", "examples": ["InvalidRequest"]},
        "detail": {"type": "string", "examples": ["steps: must be less than or equal to 150"]},
        "body": {"type": "string"},
        "errors": {"type": "string"},
    },
}


def _draws(name: str, summary: str, model: type[BaseModel], example: dict[str, Any], errors: dict[str, str]) -> dict[str, Any]:
    answer = _json("The pictures.", {"$ref": _REFERENCES.format(model="Pictures")})
    described = {**_described(name, summary), "parameters": [TIMEOUT_PARAMETER]}
    return {**described, "requestBody": _body(model, example), "responses": {"200": answer, **_errors(errors)}}


def _gets(name: str, summary: str, answer: dict[str, Any]) -> dict[str, Any]:
    return {**_described(name, summary), "responses": {"200": answer, **_errors({"500": "A defect of the server."})}}


def _asks_for_jobs(name: str, summary: str, answer: dict[str, Any]) -> dict[str, Any]:
    errors = {"500": "A defect of the server.", "503": "Where jobs stand cannot be read."}
    return {**_described(name, summary), "responses": {"200": answer, **_errors(errors)}}


def _described(name: str, summary: str) -> dict[str, Any]:
    return {"operationId": name, "summary": summary, "tags": [TAG["name"]]}


def _body(model: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    schema = {"$ref": _REFERENCES.format(model=model.__name__)}
    return {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}


def _errors(errors: dict[str, str]) -> dict[str, Any]:
    return {status: _json(text, {"$ref": _REFERENCES.format(model="Error")}) for status, text in errors.items()}


def _json(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _object(text: str, required: list[str] | None = None) -> dict[str, Any]:
    return _json(text, {"type": "object", **({"required": required} if required else {})})


def _list(text: str, example: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return _json(text, {"type": "array", "items": {"type": "object"}, **({"examples": [example]} if example else {})})


def _empty(content: Any) -> dict[str, Any]:
    return _list("Nothing.") if isinstance(content, list) else _object("Nothing.")


def _last_words(path: str) -> str:
    return "".join(word.capitalize() for word in path.rpartition("/")[2].split("-"))
