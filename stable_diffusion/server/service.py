"""`create_service`: the BentoML service, as all processes of a server import it.

It must not import torch: only the model process generates. What only API workers need is in `application.py`.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import bentoml
from bentoml.legacy import Service

from stable_diffusion.core.settings import safety_policy
from stable_diffusion.models.folder import is_in_bento, model_of_service
from stable_diffusion.server import bentoml_fixes
from stable_diffusion.server.access.keys import keep_only_digests
from stable_diffusion.state.folder import name_shared_folder

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from stable_diffusion.core.safety import SafetyPolicy
    from stable_diffusion.models.folder import ModelFolder
    from stable_diffusion.server.application import Application

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

    @functools.cache
    def model() -> ModelFolder:
        return model_of_service(folder, os.environ)

    @functools.cache
    def policy() -> SafetyPolicy:
        return safety_policy(os.environ, model_name=model().name, has_checker=model().has_safety_checker)

    @functools.cache
    def application() -> Application:
        from stable_diffusion.server.application import Application  # here: its imports take a third of a second

        return Application(name, runner, model, policy)

    def check_start() -> None:
        """Runs once, before BentoML starts any process."""
        from stable_diffusion.server.ready_line import say_when_ready
        from stable_diffusion.server.start import check_address, checked_model, warn_of_settings_without_effect

        served = checked_model(os.environ, model, bentoml_fixes.host(), in_bento=in_bento)
        check_address(bentoml_fixes.host(), bentoml_fixes.port())
        warn_of_settings_without_effect(os.environ)
        if served.is_demo:
            logger.warning("Serving the %s model, which generates coloured shapes only. 'make model' downloads a real one.", served.name)
        logger.info("When the server is ready, open its address in a browser: /ui generates images, / documents the API.")
        if not bentoml_fixes.is_encrypted():
            say_when_ready(bentoml_fixes.host(), bentoml_fixes.port(), served.name)

    async def api(scope: Scope, receive: Receive, send: Send) -> None:
        await application().api(scope, receive, send)

    service = Service(name, runners=[runner])
    service.on_deployment(check_start)
    service.mount_asgi_app(api, path="/")
    service.add_asgi_middleware(_Middleware, application=application)
    return service


class _Middleware:
    """All middleware, made when BentoML builds its HTTP application, which it does in API workers only."""

    def __init__(self, app: ASGIApp, application: Callable[[], Application]) -> None:
        self._app = application().with_middleware(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)
