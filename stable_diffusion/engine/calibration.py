"""Chooses at start how many jobs may share a step, from the times of real steps, because no number suits all hardware.

If launching dominates, a step takes the same time for many jobs. A device that is full with one job gains nothing from sharing, and every
job waits for all others. Pure arithmetic: no torch, no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

# A smaller gain does not justify that an image waits for the others in its batch.
LEAST_GAIN = 1.15
# The smallest batch with this fraction of the best throughput is chosen.
NEAR_BEST = 0.9
# Two sizes in a row that gain less than this over the best so far indicate a full device. One may be an outlier on a busy machine.
STILL_GAINING = 1.05
# Launching never takes this long: the device is full with one job, and measuring more would only delay the start.
FULL_WITH_ONE_S = 2.0


@dataclass(frozen=True)
class BatchLimit:
    """How many jobs of the model's native size may share a step, and why."""

    jobs: int
    reason: str
    limited_by_memory: bool = False  # more jobs did not fit, which depends on what else uses the device


def choose_batch_limit(step_seconds: Callable[[int], float | None], max_batch_size: int) -> BatchLimit:
    """`step_seconds(jobs)` measures a step of `jobs` jobs of the native size, or returns None if they do not fit into memory."""
    if max_batch_size == 1:
        return BatchLimit(1, "max_batch_size is 1")
    measured: dict[int, float] = {}
    without_gain = 0
    limit = f"max_batch_size is {max_batch_size}"
    for jobs in _sizes(max_batch_size):
        seconds = step_seconds(jobs)
        if seconds is None:
            limit = f"{jobs} jobs do not fit into memory"
            break
        measured[jobs] = seconds
        if jobs == 1 and seconds > FULL_WITH_ONE_S:
            return BatchLimit(1, f"a step of one job takes {seconds:.1f} s, so the device is full with one")
        best_before = max((_throughput(measured, size) for size in measured if size < jobs), default=0.0)
        without_gain = without_gain + 1 if _throughput(measured, jobs) < STILL_GAINING * best_before else 0
        if without_gain == 2:
            limit = f"{jobs} jobs gain nothing more"
            break
    return replace(_knee(measured, limit), limited_by_memory=seconds is None)


def _knee(measured: dict[int, float], limit: str) -> BatchLimit:
    times = ", ".join(f"{jobs}: {1000 * seconds:.0f} ms" for jobs, seconds in measured.items())
    if not measured:
        return BatchLimit(1, limit)
    best = max(_throughput(measured, jobs) for jobs in measured)
    gain = best / _throughput(measured, 1)
    if gain < LEAST_GAIN:
        return BatchLimit(1, f"sharing a step gains {gain:.2f}x at most ({times}; {limit})")
    chosen = min(jobs for jobs in measured if _throughput(measured, jobs) >= NEAR_BEST * best)
    return BatchLimit(
        chosen, f"{_throughput(measured, chosen) / _throughput(measured, 1):.1f}x the throughput of one at a time ({times}; {limit})"
    )


def _throughput(measured: dict[int, float], jobs: int) -> float:
    return jobs / measured[jobs]


def _sizes(max_batch_size: int) -> list[int]:
    """1, 2, 4, ... and `max_batch_size`."""
    doublings = [2**power for power in range(max_batch_size.bit_length())]
    return sorted({*(size for size in doublings if size <= max_batch_size), max_batch_size})


def batch_limit_for_size(batch_limit: BatchLimit, native_pixels: int, pixels: int, max_batch_size: int) -> int:
    """The batch limit for another size: a device is full with a number of pixels, whatever images they belong to."""
    return max(1, min(max_batch_size, round(batch_limit.jobs * native_pixels / pixels)))
