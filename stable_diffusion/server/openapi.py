"""Builds the OpenAPI 3.1 document from the `openapi` modules of the API packages."""

from __future__ import annotations

from typing import Any

from stable_diffusion.api.a1111 import openapi as a1111
from stable_diffusion.api.jobs import openapi as jobs
from stable_diffusion.api.native import openapi as native
from stable_diffusion.api.openai import openapi as openai
from stable_diffusion.api.reproduce import openapi as reproduce
from stable_diffusion.api.status import openapi as status
from stable_diffusion.core.requests import GenerationRequest
from stable_diffusion.server.access import openapi as access


def document(title: str, version: str) -> dict[str, Any]:
    """All APIs as a JSON-serialisable OpenAPI 3.1 document."""
    paths = {
        **native.paths(),
        **reproduce.paths(),
        **jobs.paths(),
        **openai.paths(),
        **a1111.paths(),
        "/livez": _probe("livez", "Is the server process alive?"),
        "/readyz": _probe("readyz", "Is the model loaded?"),
        **status.paths(),
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": title,
            "version": version,
            "description": "Stable Diffusion: text to image, image to image and inpainting. The answer is the image itself.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [api.TAG for api in (native, reproduce, jobs, openai, a1111, status)],
        "paths": access.with_keys(paths),
        "security": access.SECURITY,
        "components": {
            "securitySchemes": access.SECURITY_SCHEMES,
            "schemas": {model.__name__: _schema(model) for model in native.MODELS}
            | reproduce.SCHEMAS
            | jobs.schemas()
            | openai.schemas()
            | a1111.schemas()
            | {"Error": _ERROR_SCHEMA},
        },
    }


def _schema(model: type[GenerationRequest]) -> dict[str, Any]:
    schema = model.model_json_schema()
    schema["description"] = schema["description"].splitlines()[0]
    return schema


_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["type", "message", "problems"],
            "properties": {
                "type": {"type": "string", "examples": ["invalid_request"]},
                "message": {"type": "string", "examples": ["height: must be a multiple of 8, 100 is not"]},
                "problems": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["field", "message"],
                        "properties": {"field": {"type": ["string", "null"]}, "message": {"type": "string"}},
                    },
                },
            },
        }
    },
}


def _probe(name: str, summary: str) -> dict[str, Any]:
    answers: dict[str, Any] = {"200": {"description": "Yes.", "content": {"text/plain": {"schema": {"type": "string"}}}}}
    if name == "readyz":
        answers["503"] = {"description": "Not yet."}
    return {"get": {"operationId": name, "summary": summary, "tags": [status.TAG["name"]], "responses": answers}}
