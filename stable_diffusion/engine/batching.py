"""Which jobs share the next step. Pure Python: no torch, no clock, no threads of its own.

Within a key first in, first out; between keys the one that has waited longest for a step. So no key and no
job can starve: every key gets its turn, and the oldest jobs of a key are always in its batch.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, Protocol, TypeVar


class Batchable(Protocol):
    @property
    def batch_key(self) -> Hashable: ...


JobT = TypeVar("JobT", bound=Batchable)


class Batching(Generic[JobT]):
    """The jobs that still need steps, in the order in which they came."""

    def __init__(self, max_batch_size: int) -> None:
        """`max_batch_size`: how many jobs may share a step, at least 1."""
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, not {max_batch_size}")
        self._max_batch_size = max_batch_size
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
        return self._lowered_caps.get(key, self._max_batch_size)

    def lower_cap(self, key: Hashable, cap: int) -> None:
        """From now on at most `cap` jobs of `key` share a step. Never raises a cap."""
        self._lowered_caps[key] = max(1, min(cap, self.cap(key)))
