"""Decodes and scales uploads in turn: few images at a time, callers in rotation, and a bounded number waiting.

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
    """The queue. It runs any work; `decoded` ties it to a request."""

    def __init__(self) -> None:
        self._running = 0
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # callers in the order of their turns

    async def run(self, caller: str, work: Callable[[], T]) -> T:
        """Run `work` on a thread when it is `caller`'s turn. Raises QueueFull if too many are waiting.

        If this is cancelled while waiting, it takes no turn. Work that has begun keeps its place to its end: a thread cannot be stopped.
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
            working.exception()  # mark the exception as retrieved: the caller may have left

    async def _turn_of(self, caller: str) -> None:
        self._require_room(caller)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._leave(caller, turn)
            else:  # it has just been given its turn
                self._pass_on()
            raise

    def _require_room(self, caller: str) -> None:
        if len(self._waiting.get(caller, ())) >= MAX_WAITING_OF_CALLER:
            raise QueueFull(_told(f"{MAX_WAITING_OF_CALLER} pictures of yours"), retry_after_s=_RETRY_AFTER_S)
        if sum(map(len, self._waiting.values())) >= MAX_WAITING:
            raise QueueFull(_told(f"{MAX_WAITING} pictures"), retry_after_s=_RETRY_AFTER_S)

    def _leave(self, caller: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting[caller]
        turns.remove(turn)
        if not turns:
            del self._waiting[caller]

    def _pass_on(self) -> None:
        """Pass a free place to the waiting caller whose last turn is longest ago."""
        if not self._waiting:
            self._running -= 1
            return
        caller, turns = next(iter(self._waiting.items()))
        turns.popleft().set_result(None)
        del self._waiting[caller]
        if turns:
            self._waiting[caller] = turns


def _told(how_many: str) -> str:
    return f"{how_many} wait for being decoded already, try again in {_RETRY_AFTER_S} s"


async def decoded(request: Request, decoding: Decoding, work: Callable[[], T]) -> T:
    """Run `work` when it is this caller's turn and return its result. Raises QueueFull, and ClientGone if the client leaves."""
    return await while_connected(request, decoding.run(owner_of(request), work))
