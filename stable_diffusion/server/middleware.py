"""Middleware around the front door: path normalisation, the request log, the header against sniffing, and the shutdown of an API worker.

None of it knows routes or API keys.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import signal
import sys
from collections.abc import Callable, Collection, Coroutine
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_diffusion.core.errors import Unauthorized
from stable_diffusion.core.journal import Line, current_line, write_line
from stable_diffusion.core.shutdown import Unfinished

logger = logging.getLogger("stable_diffusion.requests")

_LOGGED_METHODS = ("POST", "DELETE")
_MAX_PATH_CHARACTERS = 200

# A worker that shuts down is still alive, has metrics, and holds images that clients may fetch. Requests for these paths do not count as
# unfinished work: uvicorn completes those that it has begun, and a polling client could delay the shutdown for ever.
_ALWAYS_SERVED = ("/livez", "/healthz", "/metrics")
_ALWAYS_SERVED_UNDER = "/jobs/"

# http://HOST/PATH. A host with user and password is not accepted: RFC 9110, 4.2.4 says to treat it as an error.
_ABSOLUTE_FORM = re.compile(rb"https?://([^/?#@\\\s]+)(/[^#]*)?", re.IGNORECASE)


class OnePath:
    """Normalises paths: removes double and trailing slashes, and the host of an absolute request target.

    So API keys, rate limits, routes, metrics and the log all see the same path, however the client writes it.
    uvicorn passes the absolute form (RFC 9112, 3.2.2) on as if it were a path: https://github.com/Kludex/uvicorn/pull/3097.
    `with_slash` lists the paths that keep their trailing slash.
    """

    def __init__(self, app: ASGIApp, with_slash: Collection[str]) -> None:
        self._app = app
        self._with_slash = frozenset(with_slash)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(self._normalised(scope) if scope["type"] == "http" else scope, receive, send)

    def _normalised(self, scope: Scope) -> Scope:
        path, headers = scope["path"], scope["headers"]
        # Match the raw path: in the decoded one, a path that begins with http%3A//HOST/ would look like the absolute form.
        if absolute := _ABSOLUTE_FORM.fullmatch(scope["raw_path"]):
            path = unquote((absolute[2] or b"/").decode("ascii"))
            # The RFC says that this host overrides the Host header, so the application must not see another one.
            headers = [(b"host", absolute[1]), *((name, value) for name, value in headers if name != b"host")]
        path = normal_path(path, self._with_slash)
        return {**scope, "path": path, "raw_path": path.encode(), "headers": headers}


def normal_path(path: str, with_slash: Collection[str] = ()) -> str:
    """The path without double or trailing slashes, except "/" and those in `with_slash`. Other targets are returned unchanged."""
    if not path.startswith("/"):
        return path
    single = re.sub("/{2,}", "/", path)
    return single if single in with_slash else single.rstrip("/") or "/"


class RequestLog:
    """Logs requests. It must surround all middleware that may refuse one."""

    def __init__(self, app: ASGIApp, with_prompts: Callable[[], bool]) -> None:
        self._app = app
        self._with_prompts = with_prompts()
        _write_to_standard_output()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        response = {"method": scope["method"], "path": scope["path"][:_MAX_PATH_CHARACTERS]}
        line = Line(self._with_prompts, scope["client"][0] if scope.get("client") else None, answer=response)
        is_logged = scope["method"] in _LOGGED_METHODS
        current_line.set(line if is_logged else None)  # a request may start in the context of the previous one on its connection

        async def noting_status(message: Message) -> None:
            if message["type"] == "http.response.start":
                response["status"] = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting_status)
        finally:
            if is_logged or response.get("status") == Unauthorized.status:
                write_line(line)


def _write_to_standard_output() -> None:
    """Write log lines without BentoML's prefix, so that programs can parse them."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


class NoSniffing:
    """Adds X-Content-Type-Options to every response: browsers then use the declared content type and do not guess another."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
            await send(message)

        await self._app(scope, receive, marked)


class Draining:
    """After SIGTERM, responds to new requests with `refusal` and passes the signal to uvicorn when all work is finished.

    uvicorn alone would stop accepting connections at once, but BentoML's first process keeps the listening socket open for its workers.
    A client that connects while the last images are generated would wait until all of them are done and then be cut off.
    """

    def __init__(self, app: ASGIApp, unfinished: Unfinished, refusal: ASGIApp) -> None:
        self._app = app
        self._unfinished = unfinished
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._take_over_sigterm()
        if scope["type"] != "http" or (self._unfinished.is_stopping and _is_always_served(scope["path"])):
            await self._app(scope, receive, send)
        elif self._unfinished.is_stopping:
            await self._refusal(scope, receive, send)
        else:
            with self._unfinished.piece_of_work():
                await self._app(scope, receive, send)

    def _take_over_sigterm(self) -> None:
        uvicorn_handler = signal.getsignal(signal.SIGTERM)
        if not callable(uvicorn_handler):
            return  # not served by uvicorn, which installs its handlers before the application starts
        stop = functools.partial(uvicorn_handler, signal.SIGTERM, None)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._unfinished.stop_when_done, stop)


class Beside:
    """Runs `work` beside the requests, from an API worker's start to its end."""

    def __init__(self, app: ASGIApp, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._app = app
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            return await self._app(scope, receive, send)
        working = asyncio.create_task(self._work())
        working.add_done_callback(_log_failure)
        try:
            await self._app(scope, receive, send)
        finally:
            working.cancel()


def _log_failure(working: asyncio.Task[None]) -> None:
    if not working.cancelled() and (error := working.exception()) is not None:
        logging.getLogger("stable_diffusion").error("No more jobs are taken from the shared queue.", exc_info=error)


def _is_always_served(path: str) -> bool:
    return path in _ALWAYS_SERVED or path.startswith(_ALWAYS_SERVED_UNDER)
