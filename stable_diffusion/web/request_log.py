"""Middleware of an API worker: opens a request's line in the journal and writes it when the request ends."""

from __future__ import annotations

import logging
import sys

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_diffusion.core.errors import Unauthorized
from stable_diffusion.core.journal import Line, current_line, write_line

logger = logging.getLogger("stable_diffusion.requests")

_LOGGED_METHODS = ("POST", "DELETE")
_MAX_PATH_CHARACTERS = 200


class RequestLog:
    """Logs requests. It surrounds all middleware that may refuse one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        _write_to_standard_output()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        answer = {"method": scope["method"], "path": scope["path"][:_MAX_PATH_CHARACTERS]}
        line = Line(scope["client"][0] if scope.get("client") else None, answer=answer)
        is_logged = scope["method"] in _LOGGED_METHODS
        current_line.set(line if is_logged else None)  # a request may start in the context of the previous one on its connection

        async def noting_status(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer["status"] = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting_status)
        finally:
            if is_logged or answer.get("status") == Unauthorized.status:
                write_line(line)


def _write_to_standard_output() -> None:
    """Write lines without the prefix of BentoML's log, so that programs can parse them."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
