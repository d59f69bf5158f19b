"""How many threads compute on a CPU: fewer while other programs also use the processor, all when it is free again.

OpenMP threads wait for each other by spinning. If another program holds a core, each of a step's thousand barriers waits for the late
thread, whose core the spinning threads hold: a step that alone takes 30 ms then takes seconds. Pure arithmetic: no torch, no clock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping

# A step that takes this many times the shortest known time is not slow by chance.
_HELD_UP = 3.0
_HELD_UP_AT_ONCE = 8.0
_FEWEST_STEPS = 3  # of a kind until its time is known: the first steps choose kernels and allocate memory
_TRY_MORE_AFTER_S = 5.0
_TRY_MORE_AFTER_MOST_S = 60.0
_MOST_KINDS = 256


def is_left_to_us(environment: Mapping[str, str]) -> bool:
    """Whether the environment sets nothing about threads."""
    return not any(name.startswith(("OMP_", "GOMP_", "MKL_NUM", "MKL_DYNAMIC", "KMP_")) for name in environment)


class ThreadCount:
    """Halves the number of threads when steps are delayed, and tries twice as many after a while."""

    def __init__(self, threads: int, set_threads: Callable[[int], None], logger_info: Callable[[str], None]) -> None:
        """`threads`: the maximum. `set_threads` sets the number from the next step on."""
        self._all = threads
        self._set_threads = set_threads
        self._say = logger_info
        self.threads = threads
        self._best_s: dict[Hashable, float] = {}  # the shortest step of a kind with all threads
        self._steps: dict[Hashable, int] = {}
        self._slow_in_a_row = 0
        self._try_again_s = 0.0
        self._wait_s = _TRY_MORE_AFTER_S
        self._is_trying = False
        self._before_trying: dict[Hashable, float] = {}  # the last step of a kind with the current, smaller number of threads

    def note_step(self, kind: Hashable, seconds: float, now_s: float) -> None:
        """Note a step's time. Steps of one `kind` (rows and size) take equally long if nothing else runs."""
        if self._is_trying:
            self._judge_trial(kind, seconds, now_s)
            return
        if self._is_held_up(kind, seconds):
            self._slow_in_a_row += 1
            if self.threads > 1 and (self._slow_in_a_row > 1 or seconds > _HELD_UP_AT_ONCE * self._usual_s(kind)):
                self._lower(now_s)
            return
        self._slow_in_a_row = 0
        if self.threads == self._all:
            self._remember(kind, seconds)
        else:
            self._before_trying[kind] = seconds
            if now_s >= self._try_again_s:
                self._is_trying = True
                self._change(min(self._all, 2 * self.threads))

    def _judge_trial(self, kind: Hashable, seconds: float, now_s: float) -> None:
        """Keep the larger number of threads if it makes a step faster whose kind was timed with fewer threads."""
        if kind not in self._before_trying:
            return
        self._is_trying = False
        if seconds < self._before_trying[kind] and not self._is_held_up(kind, seconds):
            self._wait_s = _TRY_MORE_AFTER_S
            self._try_again_s = now_s + self._wait_s
            self._before_trying.clear()
            if self.threads == self._all:
                self._say(f"Steps are computed with {self.threads} threads again.")
            return
        self._wait_s = min(2 * self._wait_s, _TRY_MORE_AFTER_MOST_S)
        self._change(max(1, self.threads // 2))
        self._try_again_s = now_s + self._wait_s

    def _lower(self, now_s: float) -> None:
        if self.threads == self._all:
            self._say("Steps take far longer than before: other programs want the processor too. Fewer threads compute for a while.")
        self._slow_in_a_row = 0
        self._change(max(1, self.threads // 2))
        self._try_again_s = now_s + self._wait_s

    def _change(self, threads: int) -> None:
        self.threads = threads
        self._set_threads(threads)

    def _is_held_up(self, kind: Hashable, seconds: float) -> bool:
        return self._steps.get(kind, 0) >= _FEWEST_STEPS and seconds > _HELD_UP * self._usual_s(kind)

    def _usual_s(self, kind: Hashable) -> float:
        """The expected seconds with the current number of threads, assuming linear speed-up."""
        return self._best_s[kind] * self._all / self.threads

    def _remember(self, kind: Hashable, seconds: float) -> None:
        if kind not in self._best_s and len(self._best_s) == _MOST_KINDS:
            self._best_s.clear()
            self._steps.clear()
        self._steps[kind] = self._steps.get(kind, 0) + 1
        self._best_s[kind] = min(seconds, self._best_s.get(kind, seconds))


def of_process(set_threads: Callable[[int], None], threads: int, logger_info: Callable[[str], None]) -> ThreadCount | None:
    """None if there is nothing to decide: there is one thread, or the environment sets the number."""
    return ThreadCount(threads, set_threads, logger_info) if threads > 1 and is_left_to_us(os.environ) else None
