"""Admission control: how much work the engine has accepted, whether it accepts more, and whether a deadline can be met.

Estimates, in seconds of the device, come from measured steps. Pure Python: no torch, no clock. The submitting threads and the engine's
thread use it.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from stable_diffusion.core.errors import DeadlineExceeded, QueueFull
from stable_diffusion.core.fair_share import share_is_left
from stable_diffusion.engine.job import Job

Size = tuple[int, int]  # height and width in pixels: a batch key

# Of the newest value in the moving means. Some turns wait for a GPU with many queued steps, so a single turn means little.
_WEIGHT_OF_THE_LAST = 0.05
_MOST_SIZES = 64


@dataclass(frozen=True)
class QueueLimits:
    """Limits in `seconds` of estimated work and in images. When they are reached, each owner still gets its share of them."""

    seconds: float
    images: float


NO_LIMITS = QueueLimits(math.inf, math.inf)


class StepTimes:
    """Seconds of a step by size and number of jobs: moving means of measurements."""

    def __init__(self) -> None:
        self._measured: dict[Size, dict[int, float]] = {}

    def note(self, size: Size, jobs: int, seconds: float) -> None:
        if size not in self._measured and len(self._measured) == _MOST_SIZES:
            del self._measured[list(self._measured)[1]]  # keep the first, the native size
        measured = self._measured.setdefault(size, {})
        last = measured.get(jobs)
        measured[jobs] = seconds if last is None else last + _WEIGHT_OF_THE_LAST * (seconds - last)

    @property
    def native_size(self) -> Size | None:
        """The size that was measured first; None if nothing was measured."""
        return next(iter(self._measured), None)

    def is_known(self, size: Size) -> bool:
        return size in self._measured

    def seconds(self, size: Size, jobs: int) -> float:
        """The expected seconds. An unmeasured number of jobs scales as if sharing gained nothing, an unmeasured size by its pixels.

        0 if nothing was measured.
        """
        if not self._measured:
            return 0.0
        nearest = size if size in self._measured else self._nearest(size)
        measured = self._measured[nearest]
        count = min(measured, key=lambda known: abs(known - jobs))
        return measured[count] * (jobs / count) * (size[0] * size[1] / (nearest[0] * nearest[1]))

    def _nearest(self, size: Size) -> Size:
        pixels = size[0] * size[1]
        return min(self._measured, key=lambda known: abs(math.log(known[0] * known[1] / pixels)))


class Workload:
    """The accepted jobs that have not ended."""

    def __init__(self, limits: QueueLimits, batch_limit: Callable[[Size], int]) -> None:
        """`batch_limit`: how many jobs of a size may share a step."""
        self._limits = limits
        self._batch_limit = batch_limit
        self._jobs: set[Job] = set()
        self._times = StepTimes()
        self._lock = threading.Lock()

    def note_step(self, size: Size, jobs: int, seconds: float) -> None:
        with self._lock:
            self._times.note(size, jobs, seconds)

    def step_seconds(self, size: Size, jobs: int) -> float:
        with self._lock:
            return self._times.seconds(size, jobs)

    def seconds(self) -> float:
        """The estimated seconds of the remaining work."""
        with self._lock:
            return sum(self._by_owner().values())

    def pixel_steps_per_s(self) -> float:
        """How fast the device works at the native size when the batch limit is reached: pixels times steps per second; 0 if unknown."""
        with self._lock:
            size = self._times.native_size
            share_s = 0.0 if size is None else self._share_of_a_step(size)
        return 0.0 if size is None or share_s == 0 else size[0] * size[1] / share_s

    def take(self, job: Job, timeout_s: float) -> None:
        """Accept a job. `timeout_s`: how long it may take until its image is finished.

        Raises QueueFull, with the seconds until there should be room, or DeadlineExceeded if the time cannot suffice.
        """
        with self._lock:
            seconds = self._by_owner()
            self._require_room(job, seconds)
            self._require_time(job, seconds, timeout_s)
            self._jobs.add(job)

    def leave(self, job: Job) -> None:
        with self._lock:
            self._jobs.discard(job)

    def _by_owner(self) -> defaultdict[str, float]:
        seconds: defaultdict[str, float] = defaultdict(float)
        of_a_step = {size: self._share_of_a_step(size) for size in {job.batch_key for job in self._jobs}}
        for job in self._jobs:
            seconds[job.owner] += job.steps_left * job.cost * of_a_step[job.batch_key]
        return seconds

    def _share_of_a_step(self, size: Size) -> float:
        """Seconds of the device for one job's step, if as many jobs share the step as the batch limit allows."""
        batch_limit = self._batch_limit(size)
        return self._times.seconds(size, batch_limit) / batch_limit

    def _require_room(self, job: Job, seconds: defaultdict[str, float]) -> None:
        total, count = sum(seconds.values()), len(self._jobs)
        over_s, over = total - self._limits.seconds, count - self._limits.images + 1
        if over_s <= 0 and over <= 0:
            return
        owners = len(seconds.keys() | {job.owner})
        owned_count = sum(other.owner == job.owner for other in self._jobs)
        seconds_left = share_is_left(seconds[job.owner], total, owners, self._limits.seconds)
        if seconds_left and share_is_left(owned_count, count, owners, self._limits.images):
            return
        retry_after_s = max(1, math.ceil(max(over_s, total / count * over)))
        raise QueueFull(
            f"the queue is full: {count} images, about {total:.0f} s of work, are waiting or running",
            retry_after_s=retry_after_s,
        )

    def _require_time(self, job: Job, seconds: defaultdict[str, float], timeout_s: float) -> None:
        """Owners share the device: until a job is done, each other owner gets at most as much time as the job's owner."""
        if not self._times.is_known(job.batch_key):
            return
        share_s = self._share_of_a_step(job.batch_key)
        # The owner's longer jobs do not run before it.
        before = [other for other in self._jobs if other.owner == job.owner and other.steps_left <= job.steps_left]
        owner_s = job.steps_left * job.cost * share_s
        owner_s += sum(other.steps_left * other.cost * self._share_of_a_step(other.batch_key) for other in before)
        shared_s = owner_s + sum(min(other, owner_s) for owner, other in seconds.items() if owner != job.owner)
        alone_s = job.steps_left * self._times.seconds(job.batch_key, 1)
        expected_s = max(alone_s, shared_s)
        if expected_s > timeout_s:
            raise DeadlineExceeded(
                f"the image would take about {expected_s:.1f} s and may take {max(0.0, timeout_s):.2f} s: "
                "request fewer steps, a smaller image or more time",
            )
