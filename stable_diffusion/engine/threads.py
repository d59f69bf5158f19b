"""How many threads compute on a CPU: fewer while other programs also use the processor, all when it is free again.

OpenMP threads wait for each other by spinning. If another program holds a core, each of a step's thousand barriers waits for the late
thread, whose core the spinning threads hold: a step that alone takes 30 ms then takes seconds. Pure arithmetic: no torch, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

from stable_diffusion.core.settings import operators_threads

# A step that takes this many times the shortest known time is not slow by chance.
_HELD_UP = 3.0
_HELD_UP_AT_ONCE = 8.0
_FEWEST_STEPS = 3  # of a kind until its time is known: the first steps choose kernels and allocate memory
_TRY_MORE_AFTER_S = 5.0
_TRY_MORE_AFTER_MOST_S = 60.0
_MOST_KINDS = 256


def of_process(
    environment: Mapping[str, str], threads: int, set_threads: Callable[[int], None], log: Callable[[str], None]
) -> ThreadCount | None:
    """None if there is nothing to decide: there is one thread, or the operator has decided."""
    setting = operators_threads(environment)
    if setting.isdigit() and int(setting) > 0:
        set_threads(int(setting))
    return ThreadCount(threads, set_threads, log) if threads > 1 and not setting else None


class ThreadCount:
    """Halves the number of threads when steps are delayed, and tries twice as many after a while."""

    def __init__(self, threads: int, set_threads: Callable[[int], None], log: Callable[[str], None]) -> None:
        """`threads`: the maximum. `set_threads` sets the number from the next step on. `log` writes a line to the log."""
        self._all = threads
        self._set_threads = set_threads
        self._log = log
        self.threads = threads
        self._best_s: dict[Hashable, float] = {}  # the shortest step of a kind with all threads
        self._steps: dict[Hashable, int] = {}
        self._last_s: dict[Hashable, float] = {}  # the last step of a kind with the current, smaller number of threads
        self._slow_in_a_row = 0
        self._before_trial: int | None = None  # the number of threads to return to; None if more are not being tried
        self._try_again_s = 0.0
        self._wait_s = _TRY_MORE_AFTER_S

    def note_step(self, kind: Hashable, seconds: float, now_s: float) -> None:
        """Note a step's time. Steps of one `kind` (rows and size) take equally long if nothing else runs."""
        held_up = self._is_held_up(kind, seconds)
        if self._before_trial is not None:
            self._judge_trial(kind, seconds, held_up, now_s)
        elif held_up:
            self._slow_in_a_row += 1
            if self._slow_in_a_row > 1 or seconds > _HELD_UP_AT_ONCE * self._usual_s(kind):
                self._lower(now_s)
        else:
            self._slow_in_a_row = 0
            self._last_s[kind] = seconds
            if self.threads == self._all:
                self._remember(kind, seconds)
            elif now_s >= self._try_again_s:
                self._before_trial = self.threads
                self._change(min(self._all, 2 * self.threads))

    def _judge_trial(self, kind: Hashable, seconds: float, held_up: bool, now_s: float) -> None:
        """More threads stay if a kind of step that is known with fewer is faster with them. A kind that is not known decides nothing."""
        assert self._before_trial is not None
        if held_up or seconds >= self._last_s.get(kind, float("inf")):
            self._wait_s = min(2 * self._wait_s, _TRY_MORE_AFTER_MOST_S)
            self._change(self._before_trial)
        elif kind in self._last_s:
            self._wait_s = _TRY_MORE_AFTER_S
            self._last_s.clear()
            if self.threads == self._all:
                self._log(f"Steps are computed with {self.threads} threads again.")
        else:
            return
        self._before_trial = None
        self._try_again_s = now_s + self._wait_s

    def _lower(self, now_s: float) -> None:
        if self.threads == 1:
            return
        if self.threads == self._all:
            self._log("Steps take far longer than before: other programs use the processor too. Fewer threads compute for a while.")
        self._slow_in_a_row = 0
        self._last_s.clear()
        self._change(max(1, self.threads // 2))
        self._try_again_s = now_s + self._wait_s

    def _change(self, threads: int) -> None:
        self.threads = threads
        self._set_threads(threads)

    def _is_held_up(self, kind: Hashable, seconds: float) -> bool:
        return self._steps.get(kind, 0) >= _FEWEST_STEPS and seconds > _HELD_UP * self._usual_s(kind)

    def _usual_s(self, kind: Hashable) -> float:
        """The time with the current number of threads, if a step shared by many threads takes proportionally less."""
        return self._best_s[kind] * self._all / self.threads

    def _remember(self, kind: Hashable, seconds: float) -> None:
        if kind not in self._best_s and len(self._best_s) == _MOST_KINDS:
            self._best_s.clear()
            self._steps.clear()
        self._steps[kind] = self._steps.get(kind, 0) + 1
        self._best_s[kind] = min(seconds, self._best_s.get(kind, seconds))
