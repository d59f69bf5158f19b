"""The state of the server, its capabilities and its metrics: /status, /capabilities, /readyz and /metrics.

These run in API workers. Facts that only a runner knows come from the status file that it writes.
"""

from __future__ import annotations

from contextlib import suppress

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from stable_diffusion.api.context import Context
from stable_diffusion.api.responses import with_error_responses
from stable_diffusion.api.status.responses import capabilities_response, status_response
from stable_diffusion.core.errors import JobsUnavailable
from stable_diffusion.state import metrics
from stable_diffusion.state.jobs import WaitingWork
from stable_diffusion.state.runner_status import living_runners

_CURRENT_STATE = {"Cache-Control": "no-store"}


def make_routes(context: Context) -> list[Route]:
    async def status(request: Request) -> Response:
        runners = await run_in_threadpool(living_runners)
        ready = await context.client.readiness.is_ready()
        model = context.model()
        await run_in_threadpool(lambda: model.hash)  # reads the weights on first use
        is_store_reachable = await _is_store_reachable(context)
        return JSONResponse(status_response(model, runners, ready, is_store_reachable), headers=_CURRENT_STATE)

    async def capabilities(request: Request) -> Response:
        served = context.served()
        return await run_in_threadpool(lambda: JSONResponse(capabilities_response(served.model, served.policy, served.loras())))

    endpoints = {"/status": status, "/capabilities": capabilities}
    return [Route(path, with_error_responses(endpoint), methods=["GET"]) for path, endpoint in endpoints.items()]


async def _is_store_reachable(context: Context) -> bool | None:
    """Whether the store that machines share can be reached; None if they share none."""
    ask = context.is_shared_state_reachable
    return None if ask is None else await run_in_threadpool(ask)


def _waiting(context: Context) -> WaitingWork | None:
    """What waits in the queue that machines share; None if they share none or the store is away."""
    with suppress(JobsUnavailable):
        return None if context.client.queue is None else context.client.queue.waiting_work()
    return None


def metrics_page(context: Context) -> ASGIApp:
    """`/metrics` as an ASGI application. It replaces BentoML's page, which cannot show the current state of a runner."""

    async def show(scope: Scope, receive: Receive, send: Send) -> None:
        is_store_reachable = await _is_store_reachable(context)
        content = await run_in_threadpool(lambda: metrics.page(is_store_reachable, _waiting(context)))
        await Response(content, media_type=CONTENT_TYPE_LATEST, headers=_CURRENT_STATE)(scope, receive, send)

    return show


def readiness_page(context: Context) -> ASGIApp:
    """`/readyz` in place of BentoML's, which waits for a dead model process and cannot tell a starting one from a slow one."""

    async def show(scope: Scope, receive: Receive, send: Send) -> None:
        ready = await context.client.readiness.is_ready()
        await PlainTextResponse("ready\n" if ready else "not ready\n", 200 if ready else 503, _CURRENT_STATE)(scope, receive, send)

    return show
