"""Limits the memory for uploads in an API worker, from their first byte until they are decoded, in total and per caller.

Does not depend on HTTP. Use it only on the event loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stable_diffusion.core.errors import QueueFull
from stable_diffusion.core.fair_share import half_of

MAX_BYTES = 256 * 2**20
MAX_BYTES_OF_CALLER = half_of(MAX_BYTES)  # the largest possible body takes half of that
# Of each body. uvicorn buffers as much per connection anyway, and so a request without images is never refused for others' uploads.
UNCOUNTED_BYTES = 64 * 2**10
_RETRY_AFTER_S = 5


class Uploads:
    """The bytes that are held, by caller."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()

    @property
    def held_bytes(self) -> int:
        return self._held.total()

    @contextmanager
    def of(self, caller: str, declared_bytes: int) -> Iterator[Callable[[int], None]]:
        """Count one upload of `caller`, which declares `declared_bytes`. Call the yielded function with the size of each piece.

        The upload counts until the block ends. The yielded function raises QueueFull if there is no room, and already for the first
        piece if the declared size does not fit.
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
