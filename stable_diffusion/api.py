"""The service: its front door, its middleware, and all doors mounted behind it. `create_service` makes it for both precisions.

Runs in API workers, which load no torch: what is computed crosses to the runner as `runnable.py` packs it.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import bentoml
import click
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.context import server_context
from bentoml._internal.utils import BentoMLDeprecationWarning
from bentoml.legacy import Service
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
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
from stable_diffusion.access import Access, check_exposure, read_access
from stable_diffusion.backend import Backend
from stable_diffusion.connections import Connections
from stable_diffusion.draining import Draining, Unfinished
from stable_diffusion.errors import ModelFolderError, RateLimited, SettingError, Unauthorized
from stable_diffusion.jobs import Jobs, new_job_id
from stable_diffusion.keys import carries_key, keep_only_digests, name_of_key
from stable_diffusion.limits import Limits, read_limits
from stable_diffusion.rate_limit import LIMITED_PATHS, RateLimit, caller_at
from stable_diffusion.request_log import RequestLog
from stable_diffusion.safety import SafetyPolicy, safety_policy
from stable_diffusion.shared_folder import name_shared_folder, shared_folder
from stable_diffusion.weights import ModelFolder

logger = logging.getLogger("stable_diffusion")

# Services with runners are "legacy" to BentoML 1.4 and on purpose here: docs/architecture.md says why.
warnings.filterwarnings("ignore", category=BentoMLDeprecationWarning)

API_VERSION = __version__


def create_service(name: str, runner: bentoml.Runner, choose_model: Callable[[], ModelFolder], *, in_bento: bool) -> Service:
    """The BentoML service `name`: `runner` draws, `choose_model` says which model it has loaded (or raises ModelFolderError)."""
    logger.setLevel(logging.INFO)
    # In a container BentoML starts no worker again that has died, which would leave a server that answers nothing for ever.
    os.environ.pop("BENTOML_CONTAINERIZED", None)
    # BentoML's own timer goes on for an hour after each answer and keeps 2.5 kB of it: gigabytes, if somebody only asks for /livez.
    BentoMLContainer.api_server_config.traffic.timeout.set(0)
    if server_context.service_type == "runner":  # whose timer does the same; API workers wait for it as long as its setting says
        BentoMLContainer.runners_config.traffic.timeout.set(0)
    name_shared_folder()  # here, because BentoML copies the environment for the runner before on_deployment
    keep_only_digests(os.environ)  # here, for the same reason
    choose_model = functools.lru_cache(maxsize=1)(choose_model)
    access = functools.lru_cache(maxsize=1)(functools.partial(read_access, os.environ))
    service = Service(name, runners=[runner])

    @functools.cache
    def policy() -> SafetyPolicy:
        return safety_policy(os.environ, choose_model())

    def check_start() -> None:
        """Runs once, before any process is started: one clear line instead of workers that die one after the other."""
        try:
            read_limits(os.environ)
            model = choose_model()
            policy()
            check_exposure(access(), _host(), in_bento=in_bento)
        except (ModelFolderError, SettingError) as error:
            raise SystemExit(f"Not started: {error}") from None
        if model.is_demo:
            logger.warning("Serving the demo model, which draws coloured shapes only. 'make model' downloads Stable Diffusion v1.4.")
        logger.info("When the server is ready, its address has a page to draw with at /ui, and one to try the API at /.")

    service.on_deployment(check_start)
    unfinished = Unfinished(_grace_s())
    backend = Backend(runner, choose_model, policy, Jobs(shared_folder), unfinished)
    service.mount_asgi_app(Starlette(routes=_routes(backend)), path="/")
    service.add_asgi_middleware(Connections)
    service.add_asgi_middleware(RequestLog)
    service.add_asgi_middleware(_NoSniffing)
    service.add_asgi_middleware(Draining, unfinished=unfinished, refusal=_stopping)
    service.add_asgi_middleware(_FrontDoor, routes=_routes(backend), pages=_pages(name, backend), access=access)
    return service


def _host() -> str:
    """Where `bentoml serve` is about to listen."""
    command = click.get_current_context(silent=True)
    given = command.params if command is not None else {}
    if host := given.get("host"):
        return str(host)
    return "127.0.0.1" if given.get("development") else str(BentoMLContainer.http.host.get())


def _grace_s() -> float:
    """What cannot be read is said where the server starts, and ends that."""
    try:
        return read_limits(os.environ).stop_grace_s
    except SettingError:
        return Limits.stop_grace_s


def _routes(backend: Backend) -> list[Route]:
    doors = (plain_api, jobs_api, reproduce_api, openai_api, a1111_api, status_api)
    return [*(route for door in doors for route in door.routes(backend)), *ui_page.routes()]


def _pages(name: str, backend: Backend) -> dict[str, ASGIApp]:
    """What is answered in place of BentoML's routes."""
    return {
        "/": HTMLResponse(openapi.PAGE, headers=openapi.PAGE_HEADERS),
        "/docs.json": JSONResponse(openapi.document(name, API_VERSION)),
        "/readyz": status_api.readiness_page(backend),
        "/metrics": status_api.show_metrics,
    }


class _NoSniffing:
    """Adds to every answer that it is of the type that it says; browsers would otherwise guess."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
            await send(message)

        await self._app(scope, receive, marked)


class _FrontDoor:
    """Gives each request that makes or changes something an id, and answers some paths by `pages` in place of BentoML's routes.

    Refuses what is no path of ours before BentoML's metrics see it, and has them see `/jobs/{job_id}` instead of each job:
    they keep a series for every path that is tried. Refuses what a page of another site would have started or changed. Before all
    that, and before anything is read: who carries no API key, where there are keys, and who asks for too much.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[Route], pages: Mapping[str, ASGIApp], access: Callable[[], Access]) -> None:
        self._app = app
        self._keys = access().keys
        self._open = frozenset((*_PROBES, *(path for name in access().open for path in _OPENED[name])))
        per_minute = access().requests_per_minute
        self._rate_limit = None if per_minute is None else RateLimit(shared_folder, per_minute)
        self._cors = _cors_options()
        self._pages = {path: self._readable(page) for path, page in pages.items()}
        self._methods: dict[str, set[str]] = {path: {"GET", "HEAD"} for path in (*self._pages, *_BENTOML_PATHS)}
        for route in routes:
            self._methods.setdefault(route.path, set()).update(route.methods or ())
        self._templates = [(re.compile(_TEMPLATE_NAME.sub(r"(?P<\1>[^/]+)", path)), path) for path in self._methods if "{" in path]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        assert scope["type"] == "http", "connections.py lets nothing else in"
        path, method, headers = scope["path"], scope["method"], Headers(scope=scope)
        key_name = name_of_key(self._keys, headers) if self._keys else None
        if self._keys and key_name is None and path not in self._open and not self._is_preflight(method, headers):
            return await self._readable(_no_key(path, headers))(scope, receive, send)
        template, path_values = self._template_of(path)
        if template not in self._methods:
            return await self._readable(_refusal(path, 404, "not_found", f"no such path: {path[:200]}"))(scope, receive, send)
        allowed = self._methods[template]
        # A browser's question before a request from another site is answered by BentoML's CORS setting.
        if method != "OPTIONS" and method not in allowed:
            return await self._readable(_not_allowed(path, method, sorted(allowed)))(scope, receive, send)
        if method not in _READING_METHODS and self._is_from_elsewhere(headers):
            message = "pages of other sites cannot do this, unless BentoML's api_server.http.cors allows their origin"
            return await _refusal(path, 403, "cross_site", message)(scope, receive, send)
        if method == "POST" and (wait_s := await self._wait_s(template, scope, key_name)):
            return await self._readable(_too_many(path, wait_s))(scope, receive, send)
        if template in self._pages and method != "OPTIONS":
            return await self._pages[template](scope, receive, send)
        job = _NamedJob(new_job_id())
        found = {"path": template, "raw_path": template.encode(), "path_values": path_values, "job": job, "key_name": key_name}
        inner = {**scope, **found}
        request_log.identify(inner)
        await self._app(inner, receive, _naming(job, send) if method == "POST" else send)

    def _is_preflight(self, method: str, headers: Headers) -> bool:
        """A browser's question before a request from another site, which carries no key; CORS answers it without going further."""
        asked = method == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers
        return asked and self._cors is not None

    def _readable(self, answer: ASGIApp) -> ASGIApp:
        return _readable(answer, self._cors)

    async def _wait_s(self, template: str, scope: Scope, key_name: str | None) -> float:
        """Without keys by the address: anybody could make up another Authorization."""
        if self._rate_limit is None or template not in LIMITED_PATHS:
            return 0.0
        address = scope["client"][0] if scope.get("client") else ""
        return await run_in_threadpool(self._rate_limit.wait_s, caller_at(address) if key_name is None else f"key {key_name}")

    def _is_from_elsewhere(self, headers: Headers) -> bool:
        """Browsers say so by a header that pages cannot set; whatever is no browser does not send it."""
        return headers.get("sec-fetch-site") == "cross-site" and not self._is_allowed_origin(headers.get("origin", ""))

    def _is_allowed_origin(self, origin: str) -> bool:
        return self._cors is not None and CORSMiddleware(_no_app, **self._cors).is_allowed_origin(origin)

    def _template_of(self, path: str) -> tuple[str, dict[str, str]]:
        for pattern, template in self._templates:
            if match := pattern.fullmatch(path):
                return template, match.groupdict()
        return path, {}


def _cors_options() -> dict[str, Any] | None:
    """From which sites pages may send requests, as BentoML's configuration says; None: from none."""
    if not BentoMLContainer.http.cors.enabled.get():
        return None
    options: dict[str, Any] = BentoMLContainer.access_control_options.get()
    return options


def _readable(answer: ASGIApp, cors: dict[str, Any] | None) -> ASGIApp:
    """What pages of sites that CORS allows can read too. Answers of the doors behind the front door get that from BentoML."""
    return answer if cors is None else CORSMiddleware(answer, **cors)


async def _no_app(scope: Scope, receive: Receive, send: Send) -> None:
    raise NotImplementedError


_READING_METHODS = ("GET", "HEAD", "OPTIONS")
_TEMPLATE_NAME = re.compile(r"{(\w+)}")


@dataclass
class _NamedJob:
    """The job that a request is for; a door may find that it is one that was there before."""

    id: str
    received_s: float = field(default_factory=time.monotonic)


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


def _no_key(path: str, headers: Headers) -> Response:
    """401. Its challenge has browsers ask for a password: any user, the key as the password."""
    carried = "the API key is not one of this server's" if carries_key(headers) else "an API key is needed"
    message = f"{carried}: send it as Authorization: Bearer KEY, as X-API-Key: KEY, or as the password of Basic with any user"
    challenge = {"WWW-Authenticate": f'Basic realm="{_REALM}", charset="UTF-8", Bearer realm="{_REALM}"'}
    return _refusal(path, Unauthorized.status, Unauthorized.type, message, challenge)


def _too_many(path: str, wait_s: float) -> Response:
    seconds = max(1, math.ceil(wait_s))
    message = f"more requests that draw came from you than are allowed in a minute, try again in {seconds} s"
    return _refusal(path, RateLimited.status, RateLimited.type, message, {"Retry-After": str(seconds)})


async def _stopping(scope: Scope, receive: Receive, send: Send) -> None:
    message = "the server is shutting down, try again in a minute"
    refusal = _refusal(scope["path"], 503, "shutting_down", message, {"Connection": "close"})
    await _readable(refusal, _cors_options())(scope, receive, send)


def _refusal(path: str, status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> Response:
    """What is refused before it reaches a door, in the form of the door that it was meant for."""
    refuse = next((form for prefix, form in _FORMS.items() if path.startswith(prefix)), answers.refusal)
    return refuse(status, kind, message, headers)


# What a path starts with, where clients know another form of errors than ours.
_FORMS = {
    **dict.fromkeys(openai_api.PREFIXES, openai_api.refusal),
    **dict.fromkeys(a1111_answers.PREFIXES, a1111_answers.refusal),
}


_REALM = "stable_diffusion"
_PROBES = ("/livez", "/readyz", "/healthz")  # load balancers have no key
_ASSETS = tuple(f"/static_content/{name}" for name in openapi.PAGE_ASSETS)
_BENTOML_PATHS = ("/livez", "/healthz", *_ASSETS)
_OPENED = {"docs": ("/", "/docs.json", *_ASSETS), "metrics": ("/metrics",)}  # by SD_OPEN
