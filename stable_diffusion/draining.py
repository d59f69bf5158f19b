"""Lets an API worker finish what it is answering when SIGTERM tells it to stop.

uvicorn alone stops listening at once, but BentoML's first process keeps the listening socket open for its workers: whoever
connects while the last pictures are drawn would wait until all of them are done and then be cut off.
"""

from __future__ import annotations

import asyncio
import functools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

# A worker that is finishing is alive, what it is doing can be measured, and what it has drawn can be fetched. Such questions keep
# nobody waiting for the end: uvicorn answers those that it has begun with, and somebody who goes on asking could hold it for ever.
_ALWAYS_ANSWERED = ("/livez", "/healthz", "/metrics")
_ALWAYS_ANSWERED_UNDER = "/jobs/"
_TIME_TO_TELL_S = 5.0  # that the grace period is over, to those who wait


class Unfinished:
    """What an API worker has begun and must end before it may stop, within a grace period."""

    def __init__(self, grace_s: float) -> None:
        self.grace_is_over = asyncio.Event()
        self._grace_s = grace_s
        self._count = 0
        self._stop: Callable[[], object] | None = None
        self._has_stopped = False

    @property
    def is_stopping(self) -> bool:
        return self._stop is not None

    @contextmanager
    def piece_of_work(self) -> Iterator[None]:
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1
            self._stop_if_idle()

    def stop_when_done(self, stop: Callable[[], object]) -> None:
        self._stop = stop
        loop = asyncio.get_running_loop()
        loop.call_later(self._grace_s, self.grace_is_over.set)
        loop.call_later(self._grace_s + _TIME_TO_TELL_S, self._stop_once)
        self._stop_if_idle()

    def _stop_if_idle(self) -> None:
        if self._count == 0:
            self._stop_once()

    def _stop_once(self) -> None:
        if self._stop is not None and not self._has_stopped:
            self._has_stopped = True
            self._stop()


class Draining:
    """After SIGTERM everything new gets `refusal`; uvicorn hears of the signal when nothing is unfinished any more."""

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
            return  # not served by uvicorn, which sets its handlers before the application starts
        stop = functools.partial(uvicorn_handler, signal.SIGTERM, None)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._unfinished.stop_when_done, stop)


def _is_always_answered(path: str) -> bool:
    return path in _ALWAYS_ANSWERED or path.startswith(_ALWAYS_ANSWERED_UNDER)
