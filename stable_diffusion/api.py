"""The service: its front door, its middleware, and all doors mounted behind it. `create_service` makes it for both precisions.

Runs in API workers, which load no torch: what is computed crosses to the runner as `runnable.py` packs it.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import bentoml
from bentoml._internal.utils import BentoMLDeprecationWarning
from bentoml.legacy import Service
from starlette.applications import Starlette
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from stable_diffusion import openapi, plain_api
from stable_diffusion.answers import refusal
from stable_diffusion.backend import Backend
from stable_diffusion.draining import Draining
from stable_diffusion.errors import ModelFolderError
from stable_diffusion.shared_folder import name_shared_folder
from stable_diffusion.weights import ModelFolder

logger = logging.getLogger("stable_diffusion")

# Services with runners are "legacy" to BentoML 1.4 and on purpose here: docs/architecture.md says why.
warnings.filterwarnings("ignore", category=BentoMLDeprecationWarning)

API_VERSION = "1.0.0"


def create_service(name: str, runner: bentoml.Runner, choose_model: Callable[[], ModelFolder]) -> Service:
    """The BentoML service `name`: `runner` draws, `choose_model` says which model it has loaded (or raises ModelFolderError)."""
    logger.setLevel(logging.INFO)
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

    service.on_deployment(check_weights)
    routes = _routes(Backend(runner, choose_model))
    service.mount_asgi_app(Starlette(routes=routes), path="/")
    stopping = refusal(503, "shutting_down", "the server is shutting down, try again in a minute", {"Connection": "close"})
    service.add_asgi_middleware(Draining, refusal=stopping)
    service.add_asgi_middleware(_FrontDoor, routes=routes, document=openapi.document(name, API_VERSION))
    return service


def _routes(backend: Backend) -> list[Route]:
    return plain_api.routes(backend)


class _FrontDoor:
    """Answers `/` and `/docs.json` in place of BentoML's routes, which come before those of a mounted application.

    Refuses what is no path of ours before BentoML's metrics see it: they keep a series for every path that is tried.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[Route], document: dict[str, Any]) -> None:
        self._app = app
        self._pages: dict[str, Response] = {"/": HTMLResponse(openapi.PAGE), "/docs.json": JSONResponse(document)}
        self._methods: dict[str, set[str]] = {path: {"GET", "HEAD"} for path in (*self._pages, *_BENTOML_PATHS)}
        for route in routes:
            self._methods.setdefault(route.path, set()).update(route.methods or ())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: ASGIApp = self._app
        if scope["type"] == "http":
            path, method = scope["path"], scope["method"]
            if path not in self._methods:
                answer = refusal(404, "not_found", f"no such path: {path[:200]}")
            elif method == "OPTIONS":
                answer = self._app  # a browser's question before a request from another site: BentoML's CORS setting answers it
            elif method not in (allowed := self._methods[path]):
                answer = _not_allowed(method, sorted(allowed))
            elif path in self._pages:
                answer = self._pages[path]
        await answer(scope, receive, send)


def _not_allowed(method: str, allowed: list[str]) -> Response:
    return refusal(405, "method_not_allowed", f"{method} is not allowed here, use {' or '.join(allowed)}", {"Allow": ", ".join(allowed)})


_BENTOML_PATHS = ("/livez", "/readyz", "/healthz", "/metrics", *(f"/static_content/{name}" for name in openapi.PAGE_ASSETS))
