"""Which jobs share the next step. Pure Python: no torch, no clock, no threads of its own.

Between keys the one that has waited longest for a step is next. Within a key, where there are more jobs than may share
a step, those with few steps left go first, within bounds: nobody is overtaken by a job that came much later.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

# A step that is left counts as much as having come so many steps later. So a short job waits for a few steps of long ones
# and not for their ends, and a job of n steps is not overtaken any more by what comes 2 n steps after it.
_STEPS_LATER = 2


class Batchable(Protocol):
    @property
    def batch_key(self) -> Hashable: ...

    @property
    def steps_left(self) -> int: ...


JobT = TypeVar("JobT", bound=Batchable)


@dataclass(frozen=True)
class Standing(Generic[JobT]):
    """`position`: 0 for those that take part in their key's next batch, then 1, 2, ...

    `batches_left`: until it is done, if nobody else comes.
    """

    job: JobT
    position: int
    batches_left: int


class Batching(Generic[JobT]):
    """The jobs that still need steps. Its clock is the number of turns that it has given."""

    def __init__(self, max_batch_size: int, cap_for: Callable[[Any], int] | None = None) -> None:
        """`max_batch_size`: how many jobs may share a step, at least 1. `cap_for`: how many of a key, where that is fewer."""
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, not {max_batch_size}")
        self._max_batch_size = max_batch_size
        self._cap_for = cap_for
        self._lowered_caps: dict[Hashable, int] = {}
        # The order of the dictionary is the order of the keys' turns. With each job the number of the turn before which it came.
        self._queues: dict[Hashable, dict[JobT, int]] = {}
        self._turns_given = 0

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator[JobT]:
        for queue in self._queues.values():
            yield from queue

    def add(self, job: JobT) -> None:
        self._queues.setdefault(job.batch_key, {})[job] = self._turns_given

    def remove(self, job: JobT) -> None:
        """Take a job out, wherever it stands. A job that is not here is ignored."""
        queue = self._queues.get(job.batch_key, {})
        if job in queue:
            del queue[job]
            if not queue:
                del self._queues[job.batch_key]

    def next_turn(self) -> tuple[list[JobT], int]:
        """The jobs of the key whose turn it is, in their order, and how many of them may take the next step together.

        Empty only if there is nothing to do. The key's turn is over then.
        """
        if not self._queues:
            return [], 0
        key = next(iter(self._queues))
        queue = self._queues.pop(key)
        self._queues[key] = queue
        self._turns_given += 1
        return self._in_order(queue), self.cap(key)

    def _in_order(self, queue: dict[JobT, int]) -> list[JobT]:
        # Sorting keeps the order in which equals came.
        return sorted(queue, key=lambda job: queue[job] + _STEPS_LATER * job.steps_left)

    def standings(self) -> Iterator[Standing[JobT]]:
        """Where each job stands, as things are now."""
        keys = len(self._queues)
        for key, queue in self._queues.items():
            cap, steps_before = self.cap(key), 0
            for index, job in enumerate(self._in_order(queue)):
                position = max(0, index - cap + 1)
                # What is before it is done `cap` at a time; the keys take turns.
                batches_left = keys * (job.steps_left + (steps_before // cap if position else 0))
                yield Standing(job, position, batches_left)
                steps_before += job.steps_left

    def cap(self, key: Hashable) -> int:
        """How many jobs of `key` may share a step."""
        cap = self._lowered_caps.get(key, self._max_batch_size)
        return cap if self._cap_for is None else max(1, min(cap, self._cap_for(key)))

    def lower_cap(self, key: Hashable, cap: int) -> None:
        """From now on at most `cap` jobs of `key` share a step. Never raises a cap."""
        self._lowered_caps[key] = max(1, min(cap, self.cap(key)))
