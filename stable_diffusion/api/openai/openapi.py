"""OpenAI's images API in the OpenAPI document, generated from the models that validate it."""

from __future__ import annotations

from typing import Any

from stable_diffusion.api.openai.parameters import ALIASES, OpenaiParameters, drawing_fields
from stable_diffusion.api.openapi import LOAD_ERRORS, TIMEOUT_PARAMETER
from stable_diffusion.core.requests import GenerationRequest, ImageToImageRequest, TextToImageRequest
from stable_diffusion.images.decode import UPLOADS_IN_WORDS
from stable_diffusion.web import sse

TAG = {"name": "openai", "description": "OpenAI's images API, for its clients"}
_EXAMPLE = {"prompt": "a small red circle on a blue background", "n": 2, "size": "auto", "seed": 1, "num_inference_steps": 20}
_ERRORS = {
    "400": "A parameter is missing, unknown, malformed or out of range; `param` names it.",
    "403": "A page of another site sent it, in a browser.",
    "404": "Another model is served (code `model_not_found`).",
    "408": "The body stalled or came too slowly; the connection is closed.",
    "413": "The body or an image is too large.",
    "415": "The body is not of the type that the endpoint takes.",
    "499": "The job was cancelled.",
    "500": "The picture could not be computed. The header x-should-retry is false.",
    **LOAD_ERRORS,
}


def paths() -> dict[str, Any]:
    generation = {"application/json": {"schema": _reference("OpenaiGeneration"), "example": _EXAMPLE}}
    edit = {"multipart/form-data": {"schema": _reference("OpenaiEdit")}}
    return {
        "/v1/images/generations": {"post": _draws("createImage", "Draw pictures from text", generation, "image_generation")},
        "/v1/images/edits": {"post": _draws("createImageEdit", "Redraw a picture, or repaint a part of it", edit, "image_edit")},
        "/v1/models": {
            "get": {
                "operationId": "listModels",
                "summary": "The one model that is served",
                "tags": [TAG["name"]],
                "responses": {"200": _json("The model.", "OpenaiModels"), "500": _json("A defect of the server.", "OpenaiError")},
            }
        },
    }


def schemas() -> dict[str, Any]:
    files = {
        "image": {
            "type": "string",
            "format": "binary",
            "description": f"The picture to edit, exactly one; `image[]` is the same. {UPLOADS_IN_WORDS}",
        },
        "mask": {
            "type": "string",
            "format": "binary",
            "description": "A PNG of the image's size: where its alpha is 0 the image is repainted, where it is 255 the image is kept. "
            "Without a mask the whole image is redrawn.",
        },
    }
    edit = _parameters(ImageToImageRequest)
    edit["properties"] = files | {name: _without_null(schema) for name, schema in edit["properties"].items()}
    edit["required"] = ["image", *edit["required"]]
    return {
        "OpenaiGeneration": _parameters(TextToImageRequest),
        "OpenaiEdit": edit,
        "OpenaiImages": _IMAGES,
        "OpenaiModels": _MODELS,
        "OpenaiError": _ERROR,
    }


def _parameters(model: type[GenerationRequest]) -> dict[str, Any]:
    ours = model.model_json_schema()["properties"]
    drawing = {name: ours[name] for name in drawing_fields(model)}
    aliases = {alias: ours[name] | {"description": f"Another name of {name}."} for alias, name in ALIASES.items()}
    return {
        "type": "object",
        "required": ["prompt"],
        "properties": drawing | OpenaiParameters.model_json_schema()["properties"] | aliases,
        "additionalProperties": False,
    }


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A form has no null: fields that are not given are missing or empty."""
    kinds = [kind for kind in schema.get("anyOf", []) if kind != {"type": "null"}]
    kept = {name: value for name, value in schema.items() if name != "anyOf" and (name, value) != ("default", None)}
    return {**kept, **kinds[0]} if len(kinds) == 1 else schema


def _draws(name: str, summary: str, content: dict[str, Any], event: str) -> dict[str, Any]:
    answer = _json(
        f"The pictures. With `stream` server-sent events: `{event}.partial_image` and `{event}.completed`, or `error`.", "OpenaiImages"
    )
    answer["content"][sse.MEDIA_TYPE] = {}
    return {
        "operationId": name,
        "summary": summary,
        "tags": [TAG["name"]],
        "parameters": [TIMEOUT_PARAMETER],
        "requestBody": {"required": True, "content": content},
        "responses": {"200": answer, **{status: _json(text, "OpenaiError") for status, text in _ERRORS.items()}},
    }


def _json(description: str, schema: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _reference(schema)}}}


def _reference(schema: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{schema}"}


_IMAGES = {
    "type": "object",
    "required": ["created", "data", "size", "output_format", "background"],
    "properties": {
        "created": {"type": "integer", "description": "Seconds since 1970."},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["b64_json", "seed", "safety_flagged"],
                "properties": {
                    "b64_json": {"type": "string", "contentEncoding": "base64"},
                    "seed": {"type": "integer", "description": "Send it again to get the same picture."},
                    "safety_flagged": {
                        "type": ["boolean", "null"],
                        "description": "true: the picture was flagged and is blank. false: it was not. null: nobody looked.",
                    },
                    "prompt_dropped": {
                        "type": "string",
                        "description": "Only there if the prompt was too long: the end that was not used.",
                    },
                    "negative_prompt_dropped": {"type": "string", "description": "The same of the negative prompt."},
                },
            },
        },
        "size": {"type": "string", "examples": ["512x512"]},
        "output_format": {"type": "string", "examples": ["png"]},
        "background": {"type": "string", "const": "opaque"},
    },
}
_MODELS = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {
        "object": {"const": "list"},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["id", "object", "created", "owned_by"],
                "properties": {
                    "id": {"type": "string"},
                    "object": {"const": "model"},
                    "created": {"type": "integer"},
                    "owned_by": {"type": "string"},
                },
            },
        },
    },
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string", "examples": ["invalid_request_error"]},
                "param": {"type": ["string", "null"], "examples": ["size"]},
                "code": {"type": ["string", "null"], "examples": ["invalid_request"]},
            },
        }
    },
}
