"""Which jobs share the next step. Pure Python: no torch, no clock, no threads of its own.

Within a key first in, first out; between keys the one that has waited longest for a step. So no key and no
job can starve: every key gets its turn, and the oldest jobs of a key are always in its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, Protocol, TypeVar


class Batchable(Protocol):
    @property
    def batch_key(self) -> Hashable: ...


JobT = TypeVar("JobT", bound=Batchable)


class Batching(Generic[JobT]):
    """The jobs that still need steps, in the order in which they came."""

    def __init__(self, max_batch_size: int, cap_for: Callable[[Any], int] | None = None) -> None:
        """`max_batch_size`: how many jobs may share a step, at least 1. `cap_for`: how many of a key, where that is fewer."""
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, not {max_batch_size}")
        self._max_batch_size = max_batch_size
        self._cap_for = cap_for
        self._lowered_caps: dict[Hashable, int] = {}
        # The order of the dictionary is the order of the keys' turns.
        self._queues: dict[Hashable, list[JobT]] = {}

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator[JobT]:
        for queue in self._queues.values():
            yield from queue

    def add(self, job: JobT) -> None:
        self._queues.setdefault(job.batch_key, []).append(job)

    def remove(self, job: JobT) -> None:
        """Take a job out, wherever it stands. A job that is not here is ignored."""
        queue = self._queues.get(job.batch_key, [])
        if job in queue:
            queue.remove(job)
            if not queue:
                del self._queues[job.batch_key]

    def next_batch(self) -> list[JobT]:
        """The jobs that take the next step together: empty only if there is nothing to do. The key's turn is over then."""
        if not self._queues:
            return []
        key = next(iter(self._queues))
        queue = self._queues.pop(key)
        self._queues[key] = queue
        return queue[: self.cap(key)]

    def cap(self, key: Hashable) -> int:
        """How many jobs of `key` may share a step."""
        cap = self._lowered_caps.get(key, self._max_batch_size)
        return cap if self._cap_for is None else max(1, min(cap, self._cap_for(key)))

    def lower_cap(self, key: Hashable, cap: int) -> None:
        """From now on at most `cap` jobs of `key` share a step. Never raises a cap."""
        self._lowered_caps[key] = max(1, min(cap, self.cap(key)))
