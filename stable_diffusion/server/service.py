"""`create_service`: assembles the APIs, the front door and the other middleware into a BentoML service.

All processes of the server call it, so it must not import torch; only the model process generates.
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path

import bentoml
from bentoml.legacy import Service
from starlette.applications import Starlette
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from stable_diffusion import __version__
from stable_diffusion.api import a1111, jobs, native, openai, reproduce, status
from stable_diffusion.api.context import Context
from stable_diffusion.core.errors import SettingError
from stable_diffusion.core.safety import SafetyPolicy
from stable_diffusion.core.settings import Limits, read_limits, read_settings, safety_policy
from stable_diffusion.core.shutdown import Unfinished
from stable_diffusion.core.types import RequestContext
from stable_diffusion.models.folder import ModelFolder, is_in_bento, model_of_service
from stable_diffusion.runner.client import RunnerClient
from stable_diffusion.runner.taking import take_jobs
from stable_diffusion.server import bentoml_fixes, openapi, pages
from stable_diffusion.server.access.keys import keep_only_digests
from stable_diffusion.server.access.policy import read_access
from stable_diffusion.server.connections import Connections
from stable_diffusion.server.front_door import FrontDoor, refuse_while_stopping
from stable_diffusion.server.middleware import Beside, Draining, NoSniffing, OnePath, RequestLog
from stable_diffusion.server.ready_line import say_when_ready
from stable_diffusion.server.start import check_address, checked_model, warn_of_settings_without_effect
from stable_diffusion.state.folder import name_shared_folder
from stable_diffusion.state.shared_state import open_state

logger = logging.getLogger("stable_diffusion")


def create_service(name: str, runner: bentoml.Runner, folder: Path) -> Service:
    """The BentoML service `name` in `folder`, with `runner` as its model process."""
    logger.setLevel(logging.INFO)
    bentoml_fixes.restart_workers_in_containers()
    bentoml_fixes.switch_off_request_timers()
    bentoml_fixes.keep_operators_threads()
    name_shared_folder()  # here, because BentoML copies the environment for the runner before it calls on_deployment
    keep_only_digests(os.environ)  # here, for the same reason
    in_bento = is_in_bento(folder)
    access = functools.lru_cache(maxsize=1)(functools.partial(read_access, os.environ))

    @functools.cache
    def model() -> ModelFolder:
        return model_of_service(folder, os.environ)

    @functools.cache
    def policy() -> SafetyPolicy:
        return safety_policy(os.environ, model_name=model().name, has_checker=model().has_safety_checker)

    def check_start() -> None:
        """Runs once, before BentoML starts any process."""
        served = checked_model(os.environ, model, bentoml_fixes.host(), in_bento=in_bento)
        check_address(bentoml_fixes.host(), bentoml_fixes.port())
        warn_of_settings_without_effect(os.environ)
        if served.is_demo:
            logger.warning("Serving the %s model, which generates coloured shapes only. 'make model' downloads a real one.", served.name)
        logger.info("When the server is ready, open its address in a browser: /ui generates images, / documents the API.")
        if not bentoml_fixes.is_encrypted():
            say_when_ready(bentoml_fixes.host(), bentoml_fixes.port(), served.name)

    def logs_prompts() -> bool:
        return read_settings(os.environ).log_prompts

    unfinished = Unfinished(_grace_s())
    state = open_state(os.environ)
    context = Context(RunnerClient(runner, state.jobs, unfinished, state.queue), model, policy, state.is_reachable)
    routes = all_routes(context)
    service = Service(name, runners=[runner])
    service.on_deployment(check_start)
    service.mount_asgi_app(_with_requested_path(Starlette(routes=routes)), path="/")
    service.add_asgi_middleware(Connections)
    service.add_asgi_middleware(OnePath, with_slash=[route.path for route in routes if route.path.endswith("/")])
    service.add_asgi_middleware(RequestLog, with_prompts=logs_prompts)
    service.add_asgi_middleware(NoSniffing)
    service.add_asgi_middleware(Draining, unfinished=unfinished, refusal=refuse_while_stopping)
    service.add_asgi_middleware(Beside, work=functools.partial(take_jobs, context.client, logs_prompts))
    service.add_asgi_middleware(FrontDoor, routes=routes, pages=make_pages(name, context), access=access, rate_limit=state.rate_limit)
    return service


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
