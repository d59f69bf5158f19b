"""The HTTP application of an API worker: routes, pages and the middleware around them.

Only API workers import this module. The first process and the model process serve no HTTP, and the imports would delay their start.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import bentoml
from starlette.applications import Starlette
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from stable_diffusion import __version__
from stable_diffusion.api import a1111, jobs, native, openai, reproduce, status
from stable_diffusion.api.context import Context
from stable_diffusion.core.errors import SettingError
from stable_diffusion.core.safety import SafetyPolicy
from stable_diffusion.core.settings import Limits, read_limits, read_settings
from stable_diffusion.core.shutdown import Unfinished
from stable_diffusion.core.types import RequestContext
from stable_diffusion.models.folder import ModelFolder
from stable_diffusion.runner.client import RunnerClient
from stable_diffusion.runner.taking import take_jobs
from stable_diffusion.server import openapi, pages
from stable_diffusion.server.access.policy import read_access
from stable_diffusion.server.connections import Connections
from stable_diffusion.server.front_door import FrontDoor, refuse_while_stopping
from stable_diffusion.server.middleware import Beside, Draining, NoSniffing, OnePath, RequestLog
from stable_diffusion.state.shared_state import open_state


class Application:
    """`api` responds to the requests that pass the middleware and that BentoML has no route for."""

    def __init__(self, name: str, runner: bentoml.Runner, model: Callable[[], ModelFolder], policy: Callable[[], SafetyPolicy]) -> None:
        """`model` and `policy` raise if there is no model or a setting is invalid, which `check_start` has reported."""
        self._name = name
        self._state = open_state(os.environ)
        self._unfinished = Unfinished(_grace_s())
        self._context = Context(
            RunnerClient(runner, self._state.jobs, self._unfinished, self._state.queue), model, policy, self._state.is_reachable
        )
        self._routes = all_routes(self._context)
        self.api: ASGIApp = _with_requested_path(Starlette(routes=self._routes))

    def with_middleware(self, app: ASGIApp) -> ASGIApp:
        """`app`, BentoML's own application, inside the middleware."""
        routes = self._routes
        access = functools.lru_cache(maxsize=1)(functools.partial(read_access, os.environ))
        app = FrontDoor(app, routes, make_pages(self._name, self._context), access, self._state.rate_limit)
        app = Beside(app, work=functools.partial(take_jobs, self._context.client, _logs_prompts))
        app = Draining(app, unfinished=self._unfinished, refusal=refuse_while_stopping)
        app = NoSniffing(app)
        app = RequestLog(app, with_prompts=_logs_prompts)
        app = OnePath(app, with_slash=[route.path for route in routes if route.path.endswith("/")])
        return Connections(app)


def _logs_prompts() -> bool:
    return read_settings(os.environ).log_prompts


def _grace_s() -> float:
    """The grace period. An invalid setting is reported by `check_start`, which ends the start."""
    try:
        return read_limits(os.environ).stop_grace_s
    except SettingError:
        return Limits.stop_grace_s


def all_routes(context: Context) -> list[Route]:
    api_routes = [route for api in (native, jobs, reproduce, openai, a1111, status) for route in api.make_routes(context)]
    return [*api_routes, *pages.routes()]


def make_pages(name: str, context: Context) -> dict[str, ASGIApp]:
    """The pages that the front door serves in place of BentoML's routes."""
    return {
        "/": HTMLResponse(pages.PAGE, headers=pages.PAGE_HEADERS),
        "/docs.json": JSONResponse(openapi.document(name, __version__)),
        "/readyz": status.readiness_page(context),
        "/metrics": status.metrics_page(context),
    }


def _with_requested_path(app: ASGIApp) -> ASGIApp:
    """Restore the requested path, which the front door has replaced by its route template for BentoML's metrics."""

    async def restored(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope[RequestContext.KEY].path
            scope = {**scope, "path": path, "raw_path": path.encode()}
        await app(scope, receive, send)

    return restored
