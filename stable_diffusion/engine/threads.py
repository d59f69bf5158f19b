"""How many threads compute on a CPU: all of them, fewer while other programs want the processor too, all again when they are gone.

Threads of OpenMP wait for each other by spinning. Where another program holds a core, a step that takes 30 ms alone takes seconds: each
of its thousand barriers waits until the scheduler lets the late thread run, and the spinning ones hold the core that it needs. Pure
arithmetic: no torch, no clock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping

# So much longer than ever before is not the machine's usual noise.
_HELD_UP = 3.0
_HELD_UP_AT_ONCE = 8.0
_FEWEST_STEPS = 3  # of a kind before it is known how long one takes: the first ones choose kernels and take memory
_TRY_MORE_AFTER_S = 5.0
_TRY_MORE_AFTER_MOST_S = 60.0
_MOST_KINDS = 256


def is_left_to_us(environment: Mapping[str, str]) -> bool:
    """Whether the operator has said nothing of threads."""
    return not any(name.startswith(("OMP_", "GOMP_", "MKL_NUM", "MKL_DYNAMIC", "KMP_")) for name in environment)


class ThreadCount:
    """Halves the number of threads when steps are held up, and tries twice as many after a while."""

    def __init__(self, threads: int, set_threads: Callable[[int], None], logger_info: Callable[[str], None]) -> None:
        """`threads`: all of them. `set_threads` makes a number of them count from the next step on."""
        self._all = threads
        self._set_threads = set_threads
        self._say = logger_info
        self.threads = threads
        self._best_s: dict[Hashable, float] = {}  # of a step of a kind with all threads
        self._steps: dict[Hashable, int] = {}
        self._slow_in_a_row = 0
        self._try_again_s = 0.0
        self._wait_s = _TRY_MORE_AFTER_S
        self._is_trying = False
        self._before_trying: dict[Hashable, float] = {}  # the last step of a kind with fewer threads

    def note_step(self, kind: Hashable, seconds: float, now_s: float) -> None:
        """A step has taken so long. Steps of one `kind` (rows and size) take equally long where nothing else runs."""
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
        """More threads stay if a step of a kind that was seen with fewer is faster with them."""
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
        """With the threads that compute now, if they gain nothing by being many."""
        return self._best_s[kind] * self._all / self.threads

    def _remember(self, kind: Hashable, seconds: float) -> None:
        if kind not in self._best_s and len(self._best_s) == _MOST_KINDS:
            self._best_s.clear()
            self._steps.clear()
        self._steps[kind] = self._steps.get(kind, 0) + 1
        self._best_s[kind] = min(seconds, self._best_s.get(kind, seconds))


def of_process(set_threads: Callable[[int], None], threads: int, logger_info: Callable[[str], None]) -> ThreadCount | None:
    """None where there is nothing to decide: one thread, or the operator has decided."""
    return ThreadCount(threads, set_threads, logger_info) if threads > 1 and is_left_to_us(os.environ) else None
