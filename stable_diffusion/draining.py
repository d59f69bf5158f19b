"""Lets an API worker finish what it is answering when SIGTERM tells it to stop.

uvicorn alone stops listening at once, but BentoML's first process keeps the listening socket open for its workers: whoever
connects while the last pictures are drawn would wait until all of them are done and then be cut off.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

# A worker that is finishing is alive, and what it is doing can be measured.
_ALWAYS_ANSWERED = ("/livez", "/healthz", "/metrics")


class Draining:
    """After SIGTERM everything new gets `refusal`; uvicorn hears of the signal when the last answer has been sent."""

    def __init__(self, app: ASGIApp, refusal: ASGIApp) -> None:
        self._app = app
        self._refusal = refusal
        self._answering = 0
        self._stop: Callable[[], object] | None = None  # set once SIGTERM has come

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._take_over_sigterm()
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._stop and scope["path"] not in _ALWAYS_ANSWERED:
            await self._refusal(scope, receive, send)
        else:
            self._answering += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._answering -= 1
                self._stop_if_idle()

    def _take_over_sigterm(self) -> None:
        uvicorn_handler = signal.getsignal(signal.SIGTERM)
        if not callable(uvicorn_handler):
            return  # not served by uvicorn, which sets its handlers before the application starts

        def drain() -> None:
            self._stop = lambda: uvicorn_handler(signal.SIGTERM, None)
            self._stop_if_idle()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, drain)

    def _stop_if_idle(self) -> None:
        if self._stop and self._answering == 0:
            self._stop()
