"""The front door: middleware that checks API keys, paths, methods, origins and the rate limit before a request reaches an API.

It knows the paths of all routes and the error form of each API dialect. It serves some pages itself, in place of BentoML's routes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_diffusion.api import responses
from stable_diffusion.api.dialect import dialect_of
from stable_diffusion.core import journal
from stable_diffusion.core.errors import RateLimited, Unauthorized, UnsupportedMediaType
from stable_diffusion.core.types import RequestContext
from stable_diffusion.server.access.keys import carries_key, name_of_key
from stable_diffusion.server.access.policy import LIMITED_PATHS, PROBES, Access, caller_at
from stable_diffusion.server.bentoml_fixes import cors_options
from stable_diffusion.server.pages import PAGE_ASSETS
from stable_diffusion.state.jobs import new_job_id
from stable_diffusion.state.rates import RateLimit
from stable_diffusion.state.shared_state import local_rate_limit
from stable_diffusion.web.content_coding import CODINGS, codings_of, decompressed, without_coding


class FrontDoor:
    """Checks each request, gives it a job id, and serves the paths in `pages` in place of BentoML's routes.

    Before reading the body it refuses, in this order: requests with two lengths; requests without a valid API key, if the server has keys;
    unknown paths and methods; changes requested by a page of another site; bodies in an unsupported content coding; callers over the rate
    limit. BentoML's metrics keep a series for every path that they see, so they get route templates such as `/jobs/{job_id}`. Paths are
    normalised already, by `OnePath` in `middleware.py`.
    """

    def __init__(
        self,
        app: ASGIApp,
        routes: Sequence[Route],
        pages: Mapping[str, ASGIApp],
        access: Callable[[], Access],
        rate_limit: Callable[[int], RateLimit] = local_rate_limit,
    ) -> None:
        """`rate_limit` makes one of so many requests per minute."""
        self._app = app
        self._keys = access().keys
        self._open = frozenset((*PROBES, *(path for name in access().open for path in _OPENED[name])))
        per_minute = access().requests_per_minute
        self._rate_limit = None if per_minute is None else rate_limit(per_minute)
        self._cors = cors_options()
        self._cors_middleware = CORSMiddleware(_no_app, **(self._cors or {}))
        self._pages = {path: self._readable(page) for path, page in pages.items()}
        self._methods: dict[str, set[str]] = {path: {"GET", "HEAD"} for path in (*self._pages, *_BENTOML_PATHS)}
        for route in routes:
            self._methods.setdefault(route.path, set()).update(route.methods or ())
        self._routes_with_values = [route for route in routes if route.param_convertors]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        assert scope["type"] == "http", "connections.py refuses WebSockets"
        path, method, headers = scope["path"], scope["method"], Headers(scope=scope)
        if "transfer-encoding" in headers and "content-length" in headers:
            return await _two_lengths(path)(scope, receive, send)
        key_name = name_of_key(self._keys, headers) if self._keys else None
        if self._keys and key_name is None and path not in self._open and not self._is_preflight(method, headers):
            return await self._readable(_no_key(path, headers))(scope, receive, send)
        template, job_in_path = self._template_of(path)
        if template not in self._methods:
            return await self._readable(_refusal(path, 404, "not_found", f"no such path: {path[:200]}"))(scope, receive, send)
        allowed = self._methods[template]
        # BentoML's CORS middleware responds to preflight requests.
        if method != "OPTIONS" and method not in allowed:
            return await self._readable(_not_allowed(path, method, sorted(allowed)))(scope, receive, send)
        if method not in _READING_METHODS and self._is_from_elsewhere(headers):
            message = "pages of other sites cannot send this request, unless BentoML's api_server.http.cors allows their origin"
            return await _refusal(path, 403, "cross_site", message)(scope, receive, send)
        codings = codings_of(headers) if method == "POST" else []
        if codings and (len(codings) > 1 or codings[0] not in CODINGS):
            return await self._readable(_unknown_coding(path, codings))(scope, receive, send)
        if method == "POST" and (wait_s := await self._wait_s(template, scope, key_name)):
            return await self._readable(_rate_limited(path, wait_s))(scope, receive, send)
        if template in self._pages and method != "OPTIONS":
            return await self._pages[template](scope, receive, send)
        context = RequestContext(new_job_id(), path, job_in_path, key_name)
        journal.identify(context)
        inner: Scope = {**scope, "path": template, "raw_path": template.encode(), RequestContext.KEY: context}
        if codings:
            inner, receive = without_coding(inner), decompressed(receive, codings[0])
        if _PRIVATE_NETWORK in headers and self._is_preflight(method, headers) and self._is_allowed_origin(headers["origin"]):
            inner, send = _without_header(inner, _PRIVATE_NETWORK), _allowing_private_network(send)
        await self._app(inner, receive, _naming_job(context, send) if method == "POST" else send)

    def _is_preflight(self, method: str, headers: Headers) -> bool:
        """Whether this is a preflight request that the CORS middleware handles. It carries no key and reaches no endpoint."""
        is_preflight = method == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers
        return is_preflight and self._cors is not None

    def _readable(self, response: ASGIApp) -> ASGIApp:
        return _readable(response, self._cors)

    async def _wait_s(self, template: str, scope: Scope, key_name: str | None) -> float:
        """The seconds until the caller may generate again. Without keys, the address identifies the caller, because a client can
        invent any Authorization header."""
        if self._rate_limit is None or template not in LIMITED_PATHS:
            return 0.0
        address = scope["client"][0] if scope.get("client") else ""
        return await run_in_threadpool(self._rate_limit.wait_s, caller_at(address) if key_name is None else f"key {key_name}")

    def _is_from_elsewhere(self, headers: Headers) -> bool:
        """Whether a page of another site sent the request. Only browsers send this header, and pages cannot set it."""
        return headers.get("sec-fetch-site") == "cross-site" and not self._is_allowed_origin(headers.get("origin", ""))

    def _is_allowed_origin(self, origin: str) -> bool:
        return self._cors is not None and self._cors_middleware.is_allowed_origin(origin)

    def _template_of(self, path: str) -> tuple[str, str | None]:
        """The route template that a path matches, or the path itself, and the id of the job that it names."""
        for route in self._routes_with_values:
            if match := route.path_regex.fullmatch(path):
                return route.path, match.groupdict().get("job_id")
        return path, None


def _readable(response: ASGIApp, cors: dict[str, Any] | None) -> ASGIApp:
    """Make a response readable for pages of sites that CORS allows. BentoML does so for the responses of the APIs."""
    return response if cors is None else CORSMiddleware(response, **cors)


async def _no_app(scope: Scope, receive: Receive, send: Send) -> None:
    raise NotImplementedError


_READING_METHODS = ("GET", "HEAD", "OPTIONS")


# A browser sends this header to ask whether a page of a public site may reach a server in a private network. BentoML's CORS middleware
# refuses preflights that carry it and has no option to allow them. Here every site that CORS allows may reach a private network too.
_PRIVATE_NETWORK = "access-control-request-private-network"


def _without_header(scope: Scope, name: str) -> Scope:
    return {**scope, "headers": [one for one in scope["headers"] if one[0] != name.encode()]}


def _allowing_private_network(send: Send) -> Send:
    async def allowing(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["Access-Control-Allow-Private-Network"] = "true"
        await send(message)

    return allowing


def _naming_job(context: RequestContext, send: Send) -> Send:
    """Add the header Job-Id to the response."""

    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["Job-Id"] = context.job_id
        await send(message)

    return named


def _two_lengths(path: str) -> Response:
    """400, and the connection is closed: a proxy may see the body end elsewhere and take the rest for another request (RFC 9112, 6.1)."""
    message = "a request must not have both Content-Length and Transfer-Encoding"
    return _refusal(path, 400, "invalid_request", message, {"Connection": "close"})


def _unknown_coding(path: str, codings: list[str]) -> Response:
    given = ", ".join(codings)[:60]
    message = f"Content-Encoding must be one of {', '.join(CODINGS)}, or be left out, got {given}"
    return _refusal(path, UnsupportedMediaType.status, UnsupportedMediaType.type, message, {"Accept-Encoding": ", ".join(CODINGS)})


def _not_allowed(path: str, method: str, allowed: list[str]) -> Response:
    named = " or ".join(one for one in allowed if one != "HEAD")
    message = f"{method} is not allowed here, use {named}"
    return _refusal(path, 405, "method_not_allowed", message, {"Allow": ", ".join(allowed)})


def _no_key(path: str, headers: Headers) -> Response:
    """401 with a challenge that makes browsers ask for a password: any user, the key as the password."""
    problem = "the API key is not one of this server's" if carries_key(headers) else "an API key is needed"
    message = f"{problem}: send it as Authorization: Bearer KEY, as X-API-Key: KEY, or as the password of Basic with any user"
    challenge = {"WWW-Authenticate": f'Basic realm="{_REALM}", charset="UTF-8", Bearer realm="{_REALM}"'}
    return _refusal(path, Unauthorized.status, Unauthorized.type, message, challenge)


def _rate_limited(path: str, wait_s: float) -> Response:
    seconds = max(1, math.ceil(wait_s))
    message = f"rate limit exceeded; retry in {seconds} s"
    return _refusal(path, RateLimited.status, RateLimited.type, message, {"Retry-After": str(seconds)})


async def refuse_while_stopping(scope: Scope, receive: Receive, send: Send) -> None:
    message = "the server is shutting down, try again in a minute"
    refusal = _refusal(scope["path"], 503, "shutting_down", message, {"Connection": "close"})
    await _readable(refusal, cors_options())(scope, receive, send)


def _refusal(path: str, status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> Response:
    """A refusal in the error form of the API that the path belongs to."""
    dialect = dialect_of(path)
    refuse = responses.refusal if dialect is None else dialect.refusal
    return refuse(status, kind, message, headers)


_REALM = "stable_diffusion"
_ASSETS = tuple(f"/static_content/{name}" for name in PAGE_ASSETS)
_BENTOML_PATHS = ("/livez", "/healthz", *_ASSETS)
_OPENED = {"docs": ("/", "/docs.json", *_ASSETS), "metrics": ("/metrics",)}  # paths that SD_OPEN opens
