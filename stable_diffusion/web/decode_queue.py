"""Decodes and scales uploads: few at a time, callers in rotation, with a limited queue.

Use it only on the event loop of an API worker.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from stable_diffusion.core.errors import QueueFull
from stable_diffusion.core.fair_share import half_of
from stable_diffusion.web.disconnect import while_connected
from stable_diffusion.web.headers import owner_of

T = TypeVar("T")

_MAX_AT_ONCE = 2  # decoding an image of maximum size takes about 300 MB and a second
MAX_WAITING = 400
MAX_WAITING_OF_CALLER = half_of(MAX_WAITING)
_RETRY_AFTER_S = 5


class Decoding:
    """The queue. It runs any work; `decoded` connects it to a request."""

    def __init__(self) -> None:
        self._running = 0
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # callers in the order of their turns

    async def run(self, caller: str, work: Callable[[], T]) -> T:
        """Run `work` on a thread when it is `caller`'s turn. Raises QueueFull if too many are waiting.

        If cancelled while waiting, it gives up its turn. Work that has begun occupies its place until it ends: threads cannot be stopped.
        """
        if self._running < _MAX_AT_ONCE:
            self._running += 1
        else:
            await self._turn_of(caller)
        working = asyncio.ensure_future(run_in_threadpool(work))
        working.add_done_callback(self._note_end)
        return await asyncio.shield(working)

    def _note_end(self, working: asyncio.Future[T]) -> None:
        self._pass_on()
        if not working.cancelled():
            working.exception()  # marks the exception as retrieved: the caller may have been cancelled

    async def _turn_of(self, caller: str) -> None:
        self._require_room(caller)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._leave(caller, turn)
            else:  # its turn had just come
                self._pass_on()
            raise

    def _require_room(self, caller: str) -> None:
        if len(self._waiting.get(caller, ())) >= MAX_WAITING_OF_CALLER:
            raise QueueFull(_message(f"{MAX_WAITING_OF_CALLER} images of this caller"), retry_after_s=_RETRY_AFTER_S)
        if sum(map(len, self._waiting.values())) >= MAX_WAITING:
            raise QueueFull(_message(f"{MAX_WAITING} images"), retry_after_s=_RETRY_AFTER_S)

    def _leave(self, caller: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting[caller]
        turns.remove(turn)
        if not turns:
            del self._waiting[caller]

    def _pass_on(self) -> None:
        """Give the free place to the waiting caller that was served longest ago."""
        if not self._waiting:
            self._running -= 1
            return
        caller, turns = next(iter(self._waiting.items()))
        turns.popleft().set_result(None)
        del self._waiting[caller]
        if turns:
            self._waiting[caller] = turns


def _message(count: str) -> str:
    return f"{count} are already waiting to be decoded, try again in {_RETRY_AFTER_S} s"


async def decoded(request: Request, decoding: Decoding, work: Callable[[], T]) -> T:
    """Run `work` when it is this caller's turn and return its result. Raises QueueFull, and ClientGone if the client disconnects."""
    return await while_connected(request, decoding.run(owner_of(request), work))
