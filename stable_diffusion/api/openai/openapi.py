"""OpenAI's images API in the OpenAPI document, generated from the models that validate it."""

from __future__ import annotations

from typing import Any

from stable_diffusion.api.openai.parameters import ALIASES, OpenaiParameters, generation_fields
from stable_diffusion.api.openai.responses import EVENTS, OpenaiError, OpenaiImages, OpenaiModel, OpenaiModels
from stable_diffusion.api.openapi import (
    IDEMPOTENCY_KEY,
    LOAD_ERRORS,
    TIMEOUT_PARAMETER,
    errors,
    event_content,
    json_content,
    json_response,
    operation,
)
from stable_diffusion.core.requests import GenerationRequest, ImageToImageRequest, TextToImageRequest
from stable_diffusion.images.decode import UPLOADS_IN_WORDS

TAG = {"name": "openai", "description": "OpenAI's images API, for its clients"}
_EXAMPLE = {"prompt": "a small red circle on a blue background", "n": 2, "size": "auto", "seed": 1, "num_inference_steps": 20}
_LORAS = '[{"name": "...", "weight": 0.8}]'
_ERRORS = {
    "400": "A parameter is missing, unknown, malformed or out of range; `param` names it.",
    "403": "A browser sent the request from a page of another site.",
    "404": "The requested model is not the served one (code `model_not_found`).",
    "408": "The body stalled or arrived too slowly; the connection is closed.",
    "413": "The body or an image is too large.",
    "415": "The body is not of the type that the endpoint takes.",
    "422": "The Idempotency-Key was used for another request, or a requested LoRA does not exist (`lora_not_found`).",
    "499": "The job was cancelled.",
    "500": "Generation failed. The header x-should-retry is false.",
    **LOAD_ERRORS,
}
_MODEL_ID = {"name": "model_id", "in": "path", "required": True, "schema": {"type": "string"}, "example": "demo"}


def paths() -> dict[str, Any]:
    generation = json_content({"$ref": "#/components/schemas/OpenaiGeneration"}, example=_EXAMPLE)
    edit = {"multipart/form-data": {"schema": {"$ref": "#/components/schemas/OpenaiEdit"}}}
    models = {"200": json_response("The model.", OpenaiModels), **errors({"500": "An internal error."}, OpenaiError)}
    not_served = {"404": _ERRORS["404"], "500": "An internal error."}
    one_model = {"200": json_response("The model.", OpenaiModel), **errors(not_served, OpenaiError)}
    return {
        "/v1/images/generations": _generates("createImage", "Generate images from text", generation, "image_generation"),
        "/v1/images/edits": _generates("createImageEdit", "Generate from an image, or repaint a part of it", edit, "image_edit"),
        "/v1/models": {"get": operation(TAG, "listModels", "The one model that is served", models)},
        "/v1/models/{model_id}": {"get": operation(TAG, "retrieveModel", "A model by name", one_model, parameters=[_MODEL_ID])},
    }


def schemas() -> dict[str, Any]:
    files = {
        "image": {
            "type": "string",
            "format": "binary",
            "description": f"The image to edit, exactly one; `image[]` is an alias. {UPLOADS_IN_WORDS}",
        },
        "mask": {
            "type": "string",
            "format": "binary",
            "description": "A PNG of the image's size: where its alpha is 0 the image is repainted, where it is 255 the image is kept. "
            "Without a mask the whole image is regenerated.",
        },
    }
    edit = _parameters(ImageToImageRequest)
    edit["properties"] = files | {name: _without_null(schema) for name, schema in edit["properties"].items()}
    edit["properties"]["loras"] = {"type": "string", "description": f"{edit['properties']['loras']['description']} As JSON: {_LORAS}"}
    edit["required"] = ["image", *edit["required"]]
    return {"OpenaiGeneration": _parameters(TextToImageRequest), "OpenaiEdit": edit}


def _parameters(model: type[GenerationRequest]) -> dict[str, Any]:
    ours = model.model_json_schema(ref_template="#/components/schemas/{model}")["properties"]
    ours["seed"]["anyOf"][0]["minimum"] = -1  # random, as without a seed
    shared = {name: ours[name] for name in generation_fields(model)}
    aliases = {alias: ours[name] | {"description": f"Alias of {name}."} for alias, name in ALIASES.items()}
    return {
        "type": "object",
        "required": ["prompt"],
        "properties": shared | OpenaiParameters.model_json_schema()["properties"] | aliases,
        "additionalProperties": False,
    }


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A form has no null: fields that are not given are missing or empty."""
    kinds = [kind for kind in schema.get("anyOf", []) if kind != {"type": "null"}]
    kept = {name: value for name, value in schema.items() if name != "anyOf" and (name, value) != ("default", None)}
    return {**kept, **kinds[0]} if len(kinds) == 1 else schema


def _generates(name: str, summary: str, content: dict[str, Any], event: str) -> dict[str, Any]:
    events = {name.format(event): model for name, model in EVENTS.items()}
    described = f"The images. With `stream`, server-sent events: `{event}.partial_image` and `{event}.completed`, or `error`."
    response = {"description": described, "content": json_content(OpenaiImages) | event_content(events)}
    responses = {"200": response, **errors(_ERRORS, OpenaiError)}
    body = {"required": True, "content": content}
    return {"post": operation(TAG, name, summary, responses, parameters=[IDEMPOTENCY_KEY, TIMEOUT_PARAMETER], requestBody=body)}
