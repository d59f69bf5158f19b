"""/status, /capabilities and /metrics in the OpenAPI document."""

from __future__ import annotations

from typing import Any, get_args

from stable_diffusion.core.safety import SafetyPolicy
from stable_diffusion.core.schedulers import SCHEDULERS
from stable_diffusion.core.types import Kind
from stable_diffusion.images.encode import MEDIA_TYPES
from stable_diffusion.runner.readiness import NOT_ANSWERING
from stable_diffusion.state.runner_status import STAGES

TAG = {"name": "operation", "description": "Run"}

_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}


def _object(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties, **more}


_STATUS = _object(
    {
        "ready": {"type": "boolean", "description": "Whether a picture can be drawn now, as /readyz says."},
        "stage": {**_TEXT, "enum": [*STAGES, NOT_ANSWERING], "description": "Of the runner that is furthest."},
        "model": _object({"name": _TEXT, "hash": _TEXT, "is_demo": {"type": "boolean"}}),
        "version": {**_TEXT, "description": "Of this service's API."},
        "runners": {
            "type": "array",
            "description": "The model processes. One that has just been started may not be listed yet.",
            "items": _object(
                {
                    "index": _COUNT,
                    "stage": {**_TEXT, "enum": list(STAGES)},
                    "since": {**_TEXT, "format": "date-time", "description": "When the stage began."},
                    "uptime_s": {"type": "number"},
                    "precision": {**_TEXT, "description": "The one that was asked for."},
                    "device": {"type": ["string", "null"], "description": "null until the weights are loaded."},
                    "dtype": {"type": ["string", "null"], "description": "What is computed in; null until the weights are loaded."},
                    "caps": {
                        "type": "array",
                        "description": "How many pictures may share a step, and why. The native size comes first.",
                        "items": _object({"width": _COUNT, "height": _COUNT, "pictures": _COUNT, "reason": _TEXT}),
                    },
                    "versions": {"type": "object", "additionalProperties": _TEXT},
                }
            ),
        },
    }
)
_CAPABILITIES = _object(
    {
        "model": _TEXT,
        "kinds": {"type": "array", "items": {**_TEXT, "enum": list(get_args(Kind))}},
        "native_size": _object({"width": _COUNT, "height": _COUNT}),
        "fields": {
            "type": "object",
            "description": "The limits and the default of each field that has them, in the words of JSON Schema.",
            "additionalProperties": {"type": "object"},
        },
        "upload": _object({"max_bytes": _COUNT, "max_pixels": _COUNT, "max_side": _COUNT}),
        "max_images": {**_COUNT, "description": "Of one request, where a request may ask for several."},
        "max_pixel_steps": {**_COUNT, "description": "Of one request: width x height x num_inference_steps, summed over its pictures."},
        "safety": _object(
            {
                "policy": {
                    **_TEXT,
                    "enum": list(get_args(SafetyPolicy)),
                    "description": "always: every picture is checked. default-on: those whose request does not say safety_check: false. "
                    "off: those whose request says safety_check: true.",
                },
                "has_checker": {"type": "boolean", "description": "Whether the model has a safety checker."},
            }
        ),
        "schedulers": {
            "type": "array",
            "description": "Noise schedulers: what answers call them, and the names that requests may use as well.",
            "items": _object({"scheduler": {**_TEXT, "enum": list(SCHEDULERS)}, "names": {"type": "array", "items": _TEXT}}),
        },
        "default_scheduler": _TEXT,
        "output_formats": {"type": "array", "items": {**_TEXT, "enum": list(MEDIA_TYPES)}},
        "previews": {"type": "boolean"},
    }
)


def paths() -> dict[str, Any]:
    return {
        "/status": _json("status", "How far the server is: model, device, loading stage, caps, versions", _STATUS),
        "/capabilities": _json("capabilities", "What can be asked for: limits, schedulers, sizes, formats", _CAPABILITIES),
        "/metrics": {"get": _get("metrics", "Prometheus metrics", {"text/plain": {"schema": _TEXT}})},
    }


def _json(name: str, summary: str, schema: dict[str, Any]) -> dict[str, Any]:
    document = _get(name, summary, {"application/json": {"schema": schema}})
    refused = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    document["responses"]["503"] = {"description": "The server is shutting down.", "content": refused}
    return {"get": document}


def _get(name: str, summary: str, content: dict[str, Any]) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": summary,
        "tags": [TAG["name"]],
        "responses": {"200": {"description": summary + ".", "content": content}},
    }
