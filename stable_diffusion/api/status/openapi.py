"""/status, /capabilities and /metrics in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from stable_diffusion.api.openapi import ERROR_CONTENT, json_content
from stable_diffusion.api.status.responses import Capabilities, Status

TAG = {"name": "operation", "description": "Run"}
_STOPPING = {"503": {"description": "The server is shutting down.", "content": ERROR_CONTENT}}


def paths() -> dict[str, Any]:
    text = {"text/plain": {"schema": str}}
    stands = "How far the server is: model, device, loading stage, caps, versions"
    return {
        "/status": _get("status", stands, json_content(Status), _STOPPING),
        "/capabilities": _get(
            "capabilities", "What can be asked for: limits, schedulers, sizes, formats", json_content(Capabilities), _STOPPING
        ),
        "/metrics": _get("metrics", "Prometheus metrics", text, {}),
    }


def _get(name: str, summary: str, content: dict[str, Any], errors: dict[str, Any]) -> dict[str, Any]:
    answers = {"200": {"description": f"{summary}.", "content": content}, **errors}
    return {"get": {"operationId": name, "summary": summary, "tags": [TAG["name"]], "responses": answers}}
