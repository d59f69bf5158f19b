"""Lets an API worker finish its requests when SIGTERM tells it to stop.

uvicorn alone stops listening at once, but BentoML's first process keeps the listening socket open for its workers. A client that connects
while the last images are generated would wait until all of them are done and then be cut off.
"""

from __future__ import annotations

import asyncio
import functools
import signal

from starlette.types import ASGIApp, Receive, Scope, Send

from stable_diffusion.core.shutdown import Unfinished

# A worker that is finishing is alive, can be measured, and holds images to be fetched. These requests do not count as unfinished work:
# uvicorn completes those that it has begun, and a client that keeps asking could delay the end for ever.
_ALWAYS_ANSWERED = ("/livez", "/healthz", "/metrics")
_ALWAYS_ANSWERED_UNDER = "/jobs/"


class Draining:
    """After SIGTERM new requests get `refusal`. The signal is passed to uvicorn when all work is finished."""

    def __init__(self, app: ASGIApp, unfinished: Unfinished, refusal: ASGIApp) -> None:
        self._app = app
        self._unfinished = unfinished
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._take_over_sigterm()
        if scope["type"] != "http" or (self._unfinished.is_stopping and _is_always_answered(scope["path"])):
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


def _is_always_answered(path: str) -> bool:
    return path in _ALWAYS_ANSWERED or path.startswith(_ALWAYS_ANSWERED_UNDER)
