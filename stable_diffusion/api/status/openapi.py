"""/status, /capabilities, /metrics and the probes in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from stable_diffusion.api.openapi import errors, json_response, operation
from stable_diffusion.api.status.responses import Capabilities, Status

TAG = {"name": "operation", "description": "Run"}


def paths() -> dict[str, Any]:
    return {
        "/status": _json("status", "How far the server is: model, device, loading stage, caps, versions", Status),
        "/capabilities": _json("capabilities", "What can be asked for: limits, schedulers, sizes, formats", Capabilities),
        "/metrics": _text("metrics", "Prometheus metrics", "Prometheus metrics."),
        "/livez": _text("livez", "Is the server process alive?", "Yes."),
        "/readyz": _text("readyz", "Is the model loaded?", "Yes.", {"503": {"description": "Not yet."}}),
    }


def _json(name: str, summary: str, model: Any) -> dict[str, Any]:
    answers = {"200": json_response(f"{summary}.", model), **errors({"503": "The server is shutting down."})}
    return {"get": operation(TAG, name, summary, answers)}


def _text(name: str, summary: str, description: str, failures: dict[str, Any] | None = None) -> dict[str, Any]:
    answer = {"description": description, "content": {"text/plain": {"schema": str}}}
    return {"get": operation(TAG, name, summary, {"200": answer, **(failures or {})})}
