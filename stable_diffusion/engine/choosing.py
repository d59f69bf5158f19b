"""Chooses at start in which way calls are computed, by trying each: the fastest, if it gives the same and is clearly faster.

Pure: it gets the calls, a measure of their difference, and a clock. Knows neither torch nor what a way does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

# A smaller gain is not worth another way of computing.
LEAST_GAIN = 1.05
# A way may be this much slower with one of the numbers of jobs: the noise of a median.
MOST_LOSS = 0.98
# Each start would wait for it.
SET_UP_MOST_S = 60.0
_TIMED_CALLS = 5

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Trial(Generic[ResultT]):
    """A way that can be tried. `compute(jobs)` computes one call of so many jobs and returns when its result is there."""

    name: str
    enter: Callable[[], None]  # sets the way up
    compute: Callable[[int], ResultT]
    leave: Callable[[], None]  # restores what was before `enter`, also after an `enter` or `compute` that raised
    least_s: float = 0.0  # with less time left it is not tried


@dataclass(frozen=True)
class Choice:
    """`left`: by name, why the other ways were left."""

    name: str
    reason: str
    left: dict[str, str] = field(default_factory=dict)
    limited_by_memory: bool = False  # some way did not fit, which depends on what else uses the device


class _Left(Exception):
    """Why a way is left."""


def choose(
    usual: Trial[ResultT],
    others: Sequence[Trial[ResultT]],
    sizes: Sequence[int],
    difference: Callable[[ResultT, ResultT], float],
    tolerance: float,
    budget_s: float,
    clock: Callable[[], float],
    fatal: tuple[type[Exception], ...] = (),
) -> Choice:
    """Try each of `others` with the numbers of jobs in `sizes`, and choose the one with the largest gain over `usual`.

    The gain is the geometric mean over `sizes`. No way may differ by more than `tolerance`, and none may be slower with one of the sizes.
    A call cannot be stopped from outside: whether `budget_s` seconds have passed is checked between calls, so a way that takes too long
    is left when its call returns. `fatal`: errors after which nothing can be computed; they are raised, as are those of `leave`.
    A way signals by MemoryError that it did not fit.
    """
    end_s = clock() + budget_s

    def require_time() -> None:
        if clock() > end_s:
            raise _Left(f"trying took too long: {budget_s:.0f} s for all ways")

    def median_s(trial: Trial[ResultT], jobs: int) -> float:
        times: list[float] = []
        for _ in range(_TIMED_CALLS):
            require_time()
            began_s = clock()
            trial.compute(jobs)
            times.append(clock() - began_s)
        return statistics.median(times)

    def seconds_of(trial: Trial[ResultT]) -> dict[int, float]:
        """By number of jobs. The calls that are compared are its warm-up."""
        began_s = clock()
        trial.enter()
        if clock() - began_s > SET_UP_MOST_S:
            raise _Left(f"each start would wait {clock() - began_s:.0f} s for it")
        for jobs in sizes:
            require_time()
            differs = difference(trial.compute(jobs), expected[jobs])
            if not differs <= tolerance:  # also if it is no number
                raise _Left(f"its result differs by {differs:.1e}; allowed is {tolerance:.1g}")
        return {jobs: median_s(trial, jobs) for jobs in sizes}

    expected = {jobs: usual.compute(jobs) for jobs in sizes}
    usual_s: dict[int, float] = {}
    left: dict[str, str] = {}
    reasons: dict[str, str] = {}
    gains: dict[str, float] = {}
    limited_by_memory = False
    for trial in others:
        if (left_s := max(0.0, end_s - clock())) <= trial.least_s:
            left[trial.name] = f"trying it may take {trial.least_s:.0f} s, and {left_s:.0f} s were left"
            continue
        seconds: dict[int, float] = {}
        try:
            seconds = seconds_of(trial)
        except fatal:
            raise
        except _Left as error:
            left[trial.name] = str(error)
        except Exception as error:
            limited_by_memory = limited_by_memory or isinstance(error, MemoryError)
            left[trial.name] = "out of memory" if isinstance(error, MemoryError) else _in_a_line(error)
        # Outside the handlers: an error's traceback holds the call's intermediate tensors.
        trial.leave()
        if not seconds:
            continue
        try:
            usual_s = usual_s or {jobs: median_s(usual, jobs) for jobs in sizes}
            gains[trial.name] = _gain(usual_s, seconds)
            reasons[trial.name] = f"{gains[trial.name]:.2f}x the speed of {usual.name} ({_times(usual_s, seconds)})"
        except _Left as error:
            left[trial.name] = str(error)
    best = max(gains, key=lambda name: gains[name], default=None)
    left |= {name: f"{reasons[best]} is faster" for name in gains if best is not None and name != best}
    if best is None:
        return Choice(usual.name, _unchosen(left), left, limited_by_memory)
    return Choice(best, reasons[best], left, limited_by_memory)


def _gain(usual_s: dict[int, float], seconds: dict[int, float]) -> float:
    """Raises _Left if it is too small."""
    ratios = {jobs: usual_s[jobs] / seconds[jobs] for jobs in seconds}
    gain = math.prod(ratios.values()) ** (1 / len(ratios))
    slower = min(ratios, key=lambda jobs: ratios[jobs])
    if ratios[slower] < MOST_LOSS:
        raise _Left(f"slower with {slower} jobs ({_times(usual_s, seconds)})")
    if gain < LEAST_GAIN:
        raise _Left(f"it gains {100 * (gain - 1):.0f} % ({_times(usual_s, seconds)}); worth it are {100 * (LEAST_GAIN - 1):.0f}")
    return gain


def _times(usual_s: dict[int, float], seconds: dict[int, float]) -> str:
    return ", ".join(f"{jobs}: {1000 * usual_s[jobs]:.1f} to {1000 * seconds[jobs]:.1f} ms" for jobs in seconds)


def _unchosen(left: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in left.items()) or "there is no other way on this device"


def _in_a_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:120]}" if text else type(error).__name__
