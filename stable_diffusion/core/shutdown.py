"""Counts the unfinished work of an API worker, which must end, or reach the end of the grace period, before the worker stops."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger("stable_diffusion")

_NOTICE_TIME_S = 5.0  # to tell waiting clients that the grace period is over


class Unfinished:
    """The work that an API worker has begun and should end before it stops."""

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
        if self._count:
            logger.info("Stopping: finishing %d requests, for at most %.0f s (SD_STOP_GRACE_S).", self._count, self._grace_s)
        loop = asyncio.get_running_loop()
        loop.call_later(self._grace_s, self.grace_is_over.set)
        loop.call_later(self._grace_s + _NOTICE_TIME_S, self._stop_once)
        self._stop_if_idle()

    def _stop_if_idle(self) -> None:
        if self._count == 0:
            self._stop_once()

    def _stop_once(self) -> None:
        if self._stop is not None and not self._has_stopped:
            self._has_stopped = True
            self._stop()
