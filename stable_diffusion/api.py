"""The service: its front door, its middleware, and all doors mounted behind it. `create_service` makes it for both precisions.

Runs in API workers, which load no torch: what is computed crosses to the runner as `runnable.py` packs it.
"""

from __future__ import annotations

import functools
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import bentoml
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.utils import BentoMLDeprecationWarning
from bentoml.legacy import Service
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_diffusion import (
    __version__,
    a1111_answers,
    a1111_api,
    answers,
    jobs_api,
    openai_api,
    openapi,
    plain_api,
    reproduce_api,
    request_log,
    status_api,
    ui_page,
)
from stable_diffusion.backend import Backend
from stable_diffusion.connections import Connections
from stable_diffusion.draining import Draining, Unfinished
from stable_diffusion.errors import ModelFolderError
from stable_diffusion.jobs import Jobs, new_job_id
from stable_diffusion.request_log import RequestLog
from stable_diffusion.shared_folder import name_shared_folder, shared_folder
from stable_diffusion.weights import ModelFolder

logger = logging.getLogger("stable_diffusion")

# Services with runners are "legacy" to BentoML 1.4 and on purpose here: docs/architecture.md says why.
warnings.filterwarnings("ignore", category=BentoMLDeprecationWarning)

API_VERSION = __version__


def create_service(name: str, runner: bentoml.Runner, choose_model: Callable[[], ModelFolder]) -> Service:
    """The BentoML service `name`: `runner` draws, `choose_model` says which model it has loaded (or raises ModelFolderError)."""
    logger.setLevel(logging.INFO)
    # BentoML's own timer goes on for an hour after each answer and keeps 2.5 kB of it: gigabytes, if somebody only asks for /livez.
    BentoMLContainer.api_server_config.traffic.timeout.set(0)
    name_shared_folder()  # here, because BentoML copies the environment for the runner before on_deployment
    choose_model = functools.lru_cache(maxsize=1)(choose_model)
    service = Service(name, runners=[runner])

    def check_weights() -> None:
        """Runs once, before any process is started: one clear line instead of workers that die one after the other."""
        try:
            model = choose_model()
        except ModelFolderError as error:
            raise SystemExit(f"Not started: {error}") from None
        if model.is_demo:
            logger.warning("Serving the demo model, which draws coloured shapes only. 'make model' downloads Stable Diffusion v1.4.")
        logger.info("When the server is ready, its address has a page to draw with at /ui, and one to try the API at /.")

    service.on_deployment(check_weights)
    unfinished = Unfinished()
    routes = _routes(Backend(runner, choose_model, Jobs(shared_folder), unfinished))
    service.mount_asgi_app(Starlette(routes=routes), path="/")
    service.add_asgi_middleware(Connections)
    service.add_asgi_middleware(RequestLog)
    service.add_asgi_middleware(Draining, unfinished=unfinished, refusal=_stopping)
    service.add_asgi_middleware(_FrontDoor, routes=routes, document=openapi.document(name, API_VERSION))
    return service


def _routes(backend: Backend) -> list[Route]:
    doors = (plain_api, jobs_api, reproduce_api, openai_api, a1111_api, status_api)
    return [*(route for door in doors for route in door.routes(backend)), *ui_page.routes()]


class _FrontDoor:
    """Gives each request that makes or changes something an id, and answers `/`, `/docs.json` and `/metrics` in place of BentoML's routes.

    Refuses what is no path of ours before BentoML's metrics see it, and has them see `/jobs/{job_id}` instead of each job:
    they keep a series for every path that is tried. Refuses what a page of another site would have started or changed.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[Route], document: dict[str, Any]) -> None:
        self._app = app
        self._is_allowed_origin = _allowed_origins()
        self._pages: dict[str, ASGIApp] = {
            "/": HTMLResponse(openapi.PAGE),
            "/docs.json": JSONResponse(document),
            "/metrics": status_api.show_metrics,
        }
        self._methods: dict[str, set[str]] = {path: {"GET", "HEAD"} for path in (*self._pages, *_BENTOML_PATHS)}
        for route in routes:
            self._methods.setdefault(route.path, set()).update(route.methods or ())
        self._templates = [(re.compile(_TEMPLATE_NAME.sub(r"(?P<\1>[^/]+)", path)), path) for path in self._methods if "{" in path]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path, method = scope["path"], scope["method"]
        template, path_values = self._template_of(path)
        if template not in self._methods:
            return await _refusal(path, 404, "not_found", f"no such path: {path[:200]}")(scope, receive, send)
        allowed = self._methods[template]
        # A browser's question before a request from another site is answered by BentoML's CORS setting.
        if method != "OPTIONS" and method not in allowed:
            return await _not_allowed(path, method, sorted(allowed))(scope, receive, send)
        if method not in _READING_METHODS and self._is_from_elsewhere(Headers(scope=scope)):
            message = "pages of other sites cannot do this, unless BentoML's api_server.http.cors allows their origin"
            return await _refusal(path, 403, "cross_site", message)(scope, receive, send)
        if template in self._pages and method != "OPTIONS":
            return await self._pages[template](scope, receive, send)
        inner = {**scope, "path": template, "raw_path": template.encode(), "path_values": path_values, "job": _NamedJob(new_job_id())}
        request_log.identify(inner)
        await self._app(inner, receive, _naming(inner["job"], send) if method == "POST" else send)

    def _is_from_elsewhere(self, headers: Headers) -> bool:
        """Browsers say so by a header that pages cannot set; whatever is no browser does not send it."""
        return headers.get("sec-fetch-site") == "cross-site" and not self._is_allowed_origin(headers.get("origin", ""))

    def _template_of(self, path: str) -> tuple[str, dict[str, str]]:
        for pattern, template in self._templates:
            if match := pattern.fullmatch(path):
                return template, match.groupdict()
        return path, {}


def _allowed_origins() -> Callable[[str], bool]:
    """Whether pages of an origin may send requests, as BentoML's configuration says and its middleware understands it."""
    if not BentoMLContainer.http.cors.enabled.get():
        return lambda origin: False
    return CORSMiddleware(_no_app, **BentoMLContainer.access_control_options.get()).is_allowed_origin


async def _no_app(scope: Scope, receive: Receive, send: Send) -> None:
    raise NotImplementedError


_READING_METHODS = ("GET", "HEAD", "OPTIONS")
_TEMPLATE_NAME = re.compile(r"{(\w+)}")


@dataclass
class _NamedJob:
    """The job that a request is for; a door may find that it is one that was there before."""

    id: str


def _naming(job: _NamedJob, send: Send) -> Send:
    """Add the header Job-Id to the answer."""

    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["Job-Id"] = job.id
        await send(message)

    return named


def _not_allowed(path: str, method: str, allowed: list[str]) -> Response:
    named = " or ".join(one for one in allowed if one != "HEAD")
    message = f"{method} is not allowed here, use {named}"
    return _refusal(path, 405, "method_not_allowed", message, {"Allow": ", ".join(allowed)})


async def _stopping(scope: Scope, receive: Receive, send: Send) -> None:
    message = "the server is shutting down, try again in a minute"
    await _refusal(scope["path"], 503, "shutting_down", message, {"Connection": "close"})(scope, receive, send)


def _refusal(path: str, status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> Response:
    """What is refused before it reaches a door, in the form of the door that it was meant for."""
    refuse = next((form for prefix, form in _FORMS.items() if path.startswith(prefix)), answers.refusal)
    return refuse(status, kind, message, headers)


# What a path starts with, where clients know another form of errors than ours.
_FORMS = {
    **dict.fromkeys(openai_api.PREFIXES, openai_api.refusal),
    **dict.fromkeys(a1111_answers.PREFIXES, a1111_answers.refusal),
}


_BENTOML_PATHS = ("/livez", "/readyz", "/healthz", *(f"/static_content/{name}" for name in openapi.PAGE_ASSETS))
