"""How much of uploads an API worker holds in memory, from their first byte until they are decoded: bounded, for each caller too.

Knows nothing of HTTP. Only for the event loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stable_diffusion.core.errors import QueueFull

MAX_BYTES = 256 * 2**20
MAX_BYTES_OF_CALLER = MAX_BYTES // 2  # the largest body of all has half of that
# Of each body. uvicorn keeps as much of every connection anyway, and a request without pictures is never refused for others' uploads.
UNCOUNTED_BYTES = 64 * 2**10
_RETRY_AFTER_S = 5


class Uploads:
    def __init__(self) -> None:
        self._held: Counter[str] = Counter()

    @property
    def held_bytes(self) -> int:
        return self._held.total()

    @contextmanager
    def of(self, caller: str, declared_bytes: int) -> Iterator[Callable[[int], None]]:
        """One more, which `caller` says has `declared_bytes`. What is given is to be called with the size of each piece that comes.

        All of it counts until the block ends. That raises QueueFull where there is no room, with the first piece where the rest will
        not fit.
        """
        received = counted = 0

        def receive(piece_bytes: int) -> None:
            nonlocal received, counted
            if not received:
                self._require_room(caller, declared_bytes - UNCOUNTED_BYTES)
            received += piece_bytes
            more = max(0, received - UNCOUNTED_BYTES) - counted
            self._require_room(caller, more)
            counted += more
            self._held[caller] += more

        try:
            yield receive
        finally:
            self._held[caller] -= counted
            if not self._held[caller]:
                del self._held[caller]

    def _require_room(self, caller: str, more: int) -> None:
        if more <= 0:
            return
        if self._held[caller] + more > MAX_BYTES_OF_CALLER:
            raise QueueFull(_told("of yours", MAX_BYTES_OF_CALLER), retry_after_s=_RETRY_AFTER_S)
        if self.held_bytes + more > MAX_BYTES:
            raise QueueFull(_told("of all callers", MAX_BYTES), retry_after_s=_RETRY_AFTER_S)


def _told(whose: str, bound_bytes: int) -> str:
    return f"the uploads {whose} that are being read may have {bound_bytes // 2**20} MiB together, try again in {_RETRY_AFTER_S} s"
