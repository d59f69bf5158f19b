"""/status, /capabilities, /metrics and the probes in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from stable_diffusion.api.openapi import errors, json_response, operation
from stable_diffusion.api.status.responses import Capabilities, Status

TAG = {"name": "operation", "description": "Status and metrics"}


def paths() -> dict[str, Any]:
    return {
        "/status": _json("status", "State of the server: model, device, loading stage, batch limits, versions", Status),
        "/capabilities": _json("capabilities", "What requests may use: limits, schedulers, sizes, formats", Capabilities),
        "/metrics": _text("metrics", "Prometheus metrics", "Prometheus metrics."),
        "/livez": _text("livez", "Is the server process alive?", "Yes."),
        "/readyz": _text("readyz", "Is the model loaded?", "Yes.", {"503": {"description": "Not yet."}}),
    }


def _json(name: str, summary: str, model: Any) -> dict[str, Any]:
    responses = {"200": json_response(f"{summary}.", model), **errors({"503": "The server is shutting down."})}
    return {"get": operation(TAG, name, summary, responses)}


def _text(name: str, summary: str, description: str, failures: dict[str, Any] | None = None) -> dict[str, Any]:
    response = {"description": description, "content": {"text/plain": {"schema": str}}}
    return {"get": operation(TAG, name, summary, {"200": response, **(failures or {})})}
