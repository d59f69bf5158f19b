"""How far the server is, what it can do, and its metrics: /status, /capabilities, /readyz and /metrics.

These run in API workers. Facts that only a runner knows come from the status file that it writes.
"""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from stable_diffusion import __version__
from stable_diffusion.api.context import Context
from stable_diffusion.api.responses import with_error_responses
from stable_diffusion.api.tasks import kinds_of
from stable_diffusion.core.requests import MAX_IMAGES, MAX_PIXEL_STEPS, ImageToImageRequest
from stable_diffusion.core.safety import SafetyPolicy
from stable_diffusion.core.schedulers import SCHEDULERS
from stable_diffusion.images.decode import MAX_UPLOAD_BYTES, MAX_UPLOAD_PIXELS, MAX_UPLOAD_SIDE
from stable_diffusion.images.encode import MEDIA_TYPES
from stable_diffusion.models.folder import ModelFolder
from stable_diffusion.runner.readiness import stage_of
from stable_diffusion.state import metrics
from stable_diffusion.state.runner_status import RunnerState, living_runners

_CURRENT_STATE = {"Cache-Control": "no-store"}
# JSON Schema's names for the limits of a field.
_LIMITS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength", "default")


def make_routes(context: Context) -> list[Route]:
    async def status(request: Request) -> Response:
        runners = await run_in_threadpool(living_runners)
        ready = await context.client.readiness.is_ready()
        model = context.model()
        await run_in_threadpool(lambda: model.hash)  # reads the weights on first use
        return JSONResponse(_status(model, runners, ready), headers=_CURRENT_STATE)

    async def capabilities(request: Request) -> Response:
        return JSONResponse(_capabilities(context.model(), context.policy()))

    endpoints = {"/status": status, "/capabilities": capabilities}
    return [Route(path, with_error_responses(endpoint), methods=["GET"]) for path, endpoint in endpoints.items()]


async def show_metrics(scope: Scope, receive: Receive, send: Send) -> None:
    """`/metrics` as an ASGI application. It replaces BentoML's page, which cannot show the current state of a runner."""
    content = await run_in_threadpool(metrics.page)
    await Response(content, media_type=CONTENT_TYPE_LATEST, headers=_CURRENT_STATE)(scope, receive, send)


def readiness_page(context: Context) -> ASGIApp:
    """`/readyz` in place of BentoML's, which waits for a dead model process and cannot tell a starting one from a slow one."""

    async def show(scope: Scope, receive: Receive, send: Send) -> None:
        ready = await context.client.readiness.is_ready()
        await PlainTextResponse("ready\n" if ready else "not ready\n", 200 if ready else 503, _CURRENT_STATE)(scope, receive, send)

    return show


def _status(model: ModelFolder, runners: list[RunnerState], ready: bool) -> dict[str, Any]:
    return {
        "ready": ready,
        "stage": stage_of(runners, ready=ready),
        "model": {"name": model.name, "hash": model.hash, "is_demo": model.is_demo},
        "version": __version__,
        "runners": [_runner(runner) for runner in runners],
    }


def _runner(runner: RunnerState) -> dict[str, Any]:
    placement = runner.placement
    return {
        "index": runner.index,
        "stage": runner.stage,
        "since": datetime.fromtimestamp(runner.since_s, timezone.utc).isoformat(timespec="milliseconds"),
        "uptime_s": round(time.time() - runner.started_s, 1),
        "precision": runner.precision,
        "device": None if placement is None else placement.device,
        "dtype": None if placement is None else placement.dtype,
        "caps": [
            {"width": batch_limit.width, "height": batch_limit.height, "pictures": batch_limit.pictures, "reason": batch_limit.reason}
            for batch_limit in runner.batch_limits
        ],
        "versions": {} if placement is None else placement.versions,
    }


def _capabilities(model: ModelFolder, policy: SafetyPolicy) -> dict[str, Any]:
    fields = ImageToImageRequest.model_json_schema()["properties"]
    return {
        "model": model.name,
        "kinds": kinds_of(model),
        "native_size": {"width": model.native_width, "height": model.native_height},
        "fields": {name: limits for name, field in fields.items() if (limits := _limits(field))},
        "upload": {"max_bytes": MAX_UPLOAD_BYTES, "max_pixels": MAX_UPLOAD_PIXELS, "max_side": MAX_UPLOAD_SIDE},
        "max_images": MAX_IMAGES,
        "max_pixel_steps": MAX_PIXEL_STEPS,
        "safety": {"policy": policy, "has_checker": model.has_safety_checker},
        "schedulers": [{"scheduler": scheduler, "names": names} for scheduler, names in SCHEDULERS.items()],
        "default_scheduler": model.scheduler,
        "output_formats": list(MEDIA_TYPES),
        "previews": "preview_every_steps" in fields,
    }


def _limits(field: dict[str, Any]) -> dict[str, Any]:
    """The limits of a field; for a field that may be null, those of its value."""
    value: dict[str, Any] = next((one for one in field.get("anyOf", ()) if one.get("type") != "null"), {})
    return {name: limit for name, limit in {**value, **field}.items() if name in _LIMITS}
