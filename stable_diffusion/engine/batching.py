"""Decides which jobs share the next step. Pure Python: no torch, no clock, no threads of its own.

The batch key whose jobs have waited longest is next. Within a key an owner's short jobs go first, within bounds, and owners get equal
shares of the device: ten images of one owner delay another owner's image by one, not by ten.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

# A remaining step counts like an arrival that is so many steps later. So a short job waits for a few steps of long jobs, not for
# their ends, and a job of n steps is not overtaken by jobs that come 2 n steps after it.
_STEPS_LATER = 2


class Batchable(Protocol):
    @property
    def batch_key(self) -> Hashable: ...

    @property
    def steps_left(self) -> int: ...

    @property
    def owner(self) -> str: ...


JobT = TypeVar("JobT", bound=Batchable)


@dataclass(frozen=True)
class Standing(Generic[JobT]):
    """Where a job stands. `position`: 0 for jobs in their key's next batch, then 1, 2, ...

    `batches_left`: the number of batches until it is done, if no other job arrives.
    """

    job: JobT
    position: int
    batches_left: int


@dataclass(frozen=True)
class _Arrival:
    turn: int  # the number of turns before its arrival
    tag: float  # how far all shares had advanced at that moment


class Batching(Generic[JobT]):
    """The jobs that still need steps. The number of turns given serves as the clock.

    If a key has more jobs than may share a step, an owner's jobs with few remaining steps go first, but no job is overtaken by one that
    came much later. Owners share by start-time fair queueing (Goyal, Vin and Cheng 1996): a job's tag says after how much work its
    owner's share of the device reaches it.
    """

    def __init__(self, max_batch_size: int, batch_limit_for: Callable[[Any], int] | None = None) -> None:
        """`max_batch_size`: how many jobs may share a step, at least 1. `batch_limit_for`: how many of one key, if fewer."""
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, not {max_batch_size}")
        self._max_batch_size = max_batch_size
        self._batch_limit_for = batch_limit_for
        self._lowered_limits: dict[Hashable, int] = {}
        self._queues: dict[Hashable, dict[JobT, _Arrival]] = {}
        self._turns_given = 0
        self._last_turns: dict[Hashable, int] = {}  # of each present key
        self._last_shares: dict[str, int] = {}  # of each present owner: the last turn of a key in which it has a job
        self._tags: dict[JobT, float] = {}  # of started jobs
        self._next_tags: dict[str, float] = {}  # of each owner that has had a share of the device

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator[JobT]:
        for queue in self._queues.values():
            yield from queue

    def add(self, job: JobT) -> None:
        if not len(self):
            self._next_tags = {}  # debts end when the device is idle
        arrival = _Arrival(self._turns_given, min(self._tags.values(), default=max(self._next_tags.values(), default=0.0)))
        self._queues.setdefault(job.batch_key, {})[job] = arrival

    def note_start(self, job: JobT) -> None:
        """The job now takes steps, for which its owner's next job has to wait. Does nothing if the job has already started."""
        if job in self._tags:
            return
        tag = max(self._queues[job.batch_key][job].tag, self._next_tags.get(job.owner, 0.0))
        self._tags[job] = tag
        self._next_tags[job.owner] = tag + self._turns_of(job)

    def remove(self, job: JobT) -> None:
        """Remove a job in any state. An unknown job is ignored."""
        queue = self._queues.get(job.batch_key, {})
        if job not in queue:
            return
        del queue[job]
        if job in self._tags:
            del self._tags[job]
            # Its owner does not owe the steps that the job will not take.
            self._next_tags[job.owner] -= self._turns_of(job)
        if not queue:
            del self._queues[job.batch_key]
            self._last_turns.pop(job.batch_key, None)
        owners = {other.owner for other in self}
        self._last_shares = {owner: turn for owner, turn in self._last_shares.items() if owner in owners}
        least = min(self._tags.values(), default=0.0)
        self._next_tags = {owner: tag for owner, tag in self._next_tags.items() if owner in owners or tag > least}

    def _turns_of(self, job: JobT) -> float:
        """The cost of a job's remaining steps in full batches."""
        return job.steps_left / self.batch_limit(job.batch_key)

    def next_turn(self) -> tuple[list[JobT], int]:
        """The jobs of the next key in their order, and how many of them may take the step together. This ends the key's turn.

        Empty only if there is nothing to do.
        """
        if not self._queues:
            return [], 0
        key = min(self._queues, key=self._waiting_since)
        self._turns_given += 1
        self._last_turns[key] = self._turns_given
        self._last_shares |= dict.fromkeys((job.owner for job in self._queues[key]), self._turns_given)
        return self._in_order(key), self.batch_limit(key)

    def _waiting_since(self, key: Hashable) -> tuple[int, int]:
        """Since which turn some owner with a job in this key has had no share, then since which turn the key has had none.

        An owner with jobs in many keys has one share.
        """
        waiting = min(max(arrival.turn, self._last_shares.get(job.owner, 0)) for job, arrival in self._queues[key].items())
        return waiting, self._last_turns.get(key, 0)

    def _in_order(self, key: Hashable) -> list[JobT]:
        """The jobs of the key: each owner's in that owner's order, merged by their tags."""
        queue = self._queues[key]
        owned: dict[str, list[JobT]] = {}
        # Sorting is stable: equal jobs keep their order of arrival.
        for job in sorted(queue, key=lambda job: queue[job].turn + _STEPS_LATER * job.steps_left):
            owned.setdefault(job.owner, []).append(job)
        return [job for _, job in heapq.merge(*(self._tagged(jobs, queue) for jobs in owned.values()), key=lambda tagged: tagged[0])]

    def _tagged(self, jobs: list[JobT], queue: dict[JobT, _Arrival]) -> list[tuple[float, JobT]]:
        """One owner's jobs in that owner's order, each with the tag that is compared with other owners' tags.

        A short job that overtakes started jobs of its owner takes the first of their tags, so that it does not delay other owners.
        """
        tags: list[float] = []
        free_from = self._next_tags.get(jobs[0].owner, 0.0)
        for job in jobs:
            tag = self._tags.get(job)
            if tag is None:
                tag = max(queue[job].tag, free_from)
                free_from = tag + self._turns_of(job)
            tags.append(tag)
        return list(zip(sorted(tags), jobs, strict=True))

    def standings(self) -> Iterator[Standing[JobT]]:
        """Where each job currently stands."""
        keys = len(self._queues)
        for key in self._queues:
            batch_limit, steps_before = self.batch_limit(key), 0
            for index, job in enumerate(self._in_order(key)):
                position = max(0, index - batch_limit + 1)
                # The jobs before it finish `batch_limit` at a time; the keys take turns.
                batches_left = keys * (job.steps_left + (steps_before // batch_limit if position else 0))
                yield Standing(job, position, batches_left)
                steps_before += job.steps_left

    def batch_limit(self, key: Hashable) -> int:
        """How many jobs of `key` may share a step."""
        batch_limit = self._lowered_limits.get(key, self._max_batch_size)
        return batch_limit if self._batch_limit_for is None else max(1, min(batch_limit, self._batch_limit_for(key)))

    def lower_batch_limit(self, key: Hashable, batch_limit: int) -> None:
        """From now on at most `batch_limit` jobs of `key` share a step. Never raises a batch limit."""
        self._lowered_limits[key] = max(1, min(batch_limit, self.batch_limit(key)))
