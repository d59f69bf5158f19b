"""Limits the memory that uploads take in an API worker, in total and per caller, from the first byte until they are decoded.

Does not depend on HTTP. Use it only on the event loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stable_diffusion.core.errors import QueueFull
from stable_diffusion.core.fair_share import half_of

MAX_BYTES = 256 * 2**20
MAX_BYTES_OF_CALLER = half_of(MAX_BYTES)  # twice the largest possible body
# Of each body. uvicorn buffers as much per connection anyway. So other callers' uploads never block a request without images.
UNCOUNTED_BYTES = 64 * 2**10
_RETRY_AFTER_S = 5


class Uploads:
    """Counts the bytes that each caller's uploads occupy."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()

    @property
    def held_bytes(self) -> int:
        return self._held.total()

    @contextmanager
    def of(self, caller: str, declared_bytes: int) -> Iterator[Callable[[int], None]]:
        """Count one upload of `caller`, which declares `declared_bytes`. Call the yielded function with the size of each piece.

        The upload counts until the block ends. The yielded function raises QueueFull if the upload exceeds the budget; if the declared
        size does, already on the first piece.
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
            raise QueueFull(_message("of this caller", MAX_BYTES_OF_CALLER), retry_after_s=_RETRY_AFTER_S)
        if self.held_bytes + more > MAX_BYTES:
            raise QueueFull(_message("of all callers", MAX_BYTES), retry_after_s=_RETRY_AFTER_S)


def _message(whose: str, limit_bytes: int) -> str:
    return f"the uploads {whose} in progress must not exceed {limit_bytes // 2**20} MiB in total, try again in {_RETRY_AFTER_S} s"
