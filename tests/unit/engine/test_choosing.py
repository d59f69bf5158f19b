"""The way of computing follows from trials: `stable_diffusion/engine/choosing.py`, with made-up ways and a made-up clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest

from stable_diffusion.engine.choosing import SET_UP_MOST_S, Choice, Trial, choose

SIZES = (1, 8)
EAGER_S = {1: 0.024, 8: 0.050}


class FakeDevice:
    """Ways whose calls take the time that they are said to take. `state` is what is set up on the device."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.state = "eager"
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now_s

    def way(
        self,
        name: str,
        seconds: dict[int, float] | float,
        *,
        result: float = 1.0,
        set_up_s: float = 0.0,
        least_s: float = 0.0,
        raises: Callable[[int], Exception | None] = lambda jobs: None,
        fails_to_start: Exception | None = None,
    ) -> Trial[float]:
        def enter() -> None:
            assert self.state == "eager", "a way was tried on top of another"
            self.state = name
            self.now_s += set_up_s
            if fails_to_start is not None:
                raise fails_to_start

        def compute(jobs: int) -> float:
            assert self.state == name, "the calls of a way were computed in another"
            self.calls.append(name)
            self.now_s += seconds[jobs] if isinstance(seconds, dict) else EAGER_S[jobs] * seconds
            if (error := raises(jobs)) is not None:
                raise error
            return result

        def leave() -> None:
            self.state = "eager"

        return Trial(name, enter, compute, leave, least_s)

    def choose(self, *others: Trial[float], budget_s: float = 60.0, fatal: tuple[type[Exception], ...] = ()) -> Choice:
        choice = choose(self.way("eager", 1.0), others, SIZES, lambda one, other: abs(one - other), 0.005, budget_s, self.clock, fatal)
        assert self.state == "eager", "a way was left as it was"
        return choice


def test_the_fastest_is_chosen_with_the_times_as_reason() -> None:
    device = FakeDevice()
    choice = device.choose(device.way("graphs", {1: 0.012, 8: 0.0498}), device.way("channels_last", {1: 0.0225, 8: 0.0495}))
    assert choice.name == "graphs"
    assert choice.reason == "1.42x the speed of eager (1: 24.0 to 12.0 ms, 8: 50.0 to 49.8 ms)"
    assert choice.left == {"channels_last": "it gains 4 % (1: 24.0 to 22.5 ms, 8: 50.0 to 49.5 ms); worth it are 5"}


def test_of_two_that_gain_the_faster_one_is_chosen_and_the_other_says_so() -> None:
    device = FakeDevice()
    choice = device.choose(device.way("graphs", 0.8), device.way("compile", 0.7))
    assert choice.name == "compile"
    assert choice.left["graphs"].startswith("1.43x the speed of eager")
    assert choice.left["graphs"].endswith("is faster")


@pytest.mark.parametrize(("factor", "chosen"), [(1.5, "eager"), (1.0, "eager"), (0.96, "eager"), (0.94, "other")])
def test_a_way_must_gain_five_percent(factor: float, chosen: str) -> None:
    device = FakeDevice()
    assert device.choose(device.way("other", factor)).name == chosen


def test_a_way_that_loses_with_many_jobs_is_left_whatever_it_gains_with_one() -> None:
    device = FakeDevice()
    choice = device.choose(device.way("channels_last+graphs", {1: 0.0102, 8: 0.0529}))
    assert choice.name == "eager"
    assert choice.reason == "channels_last+graphs: slower with 8 jobs (1: 24.0 to 10.2 ms, 8: 50.0 to 52.9 ms)"


@pytest.mark.parametrize("result", [1.006, 0.99, math.nan, math.inf])
def test_a_way_that_differs_by_more_than_the_tolerance_is_left_at_once(result: float) -> None:
    device = FakeDevice()
    choice = device.choose(device.way("wrong", 0.1, result=result))
    assert choice.name == "eager"
    assert "wrong: its result differs by" in choice.reason
    assert "allowed is 0.005" in choice.reason
    assert device.calls.count("wrong") == 1


def test_a_way_within_the_tolerance_is_not_left() -> None:
    device = FakeDevice()
    assert device.choose(device.way("other", 0.5, result=1.004)).name == "other"


def test_a_way_that_raises_is_left_with_the_error_and_the_next_one_is_tried() -> None:
    device = FakeDevice()
    breaks = device.way("compile", 0.1, fails_to_start=RuntimeError("no compiler\nand a long story"))
    breaks_later = device.way("channels_last", 0.1, raises=lambda jobs: ValueError() if jobs == 8 else None)
    choice = device.choose(breaks, breaks_later, device.way("graphs", 0.5))
    assert choice.name == "graphs"
    assert choice.left == {"compile": "RuntimeError: no compiler", "channels_last": "ValueError"}
    assert not choice.limited_by_memory


def test_a_way_that_does_not_fit_is_left_and_the_choice_says_that_memory_mattered() -> None:
    device = FakeDevice()
    choice = device.choose(device.way("graphs", 0.5, raises=lambda jobs: MemoryError() if jobs == 8 else None))
    assert choice == Choice("eager", "graphs: out of memory", {"graphs": "out of memory"}, limited_by_memory=True)


def test_a_way_that_takes_too_long_is_left_when_its_call_returns_and_so_are_those_after_it() -> None:
    device = FakeDevice()
    choice = device.choose(device.way("slow", 1e4), device.way("next", 0.5), budget_s=60.0)
    assert choice.name == "eager"
    assert choice.left == {"slow": "trying took too long: 60 s for all ways", "next": "trying it may take 0 s, and 0 s were left"}
    assert device.calls.count("slow") == 1


def test_a_way_that_every_start_would_wait_for_is_left() -> None:
    device = FakeDevice()
    choice = device.choose(device.way("compile", 0.1, set_up_s=SET_UP_MOST_S + 1), budget_s=600.0)
    assert choice.left == {"compile": "each start would wait 61 s for it"}
    assert "compile" not in device.calls


def test_a_way_that_needs_more_time_than_is_left_is_not_tried() -> None:
    device = FakeDevice()
    choice = device.choose(device.way("graphs", 0.5), device.way("compile", 0.1, least_s=50.0), budget_s=40.0)
    assert choice.name == "graphs"
    assert choice.left == {"compile": "trying it may take 50 s, and 39 s were left"}
    assert "compile" not in device.calls


def test_a_failed_device_is_not_taken_for_a_way_that_raises() -> None:
    class DeviceFailed(RuntimeError):
        pass

    device = FakeDevice()
    with pytest.raises(DeviceFailed):
        choose(
            device.way("eager", 1.0),
            [device.way("graphs", 0.5, raises=lambda jobs: DeviceFailed("an illegal access"))],
            SIZES,
            lambda one, other: abs(one - other),
            0.0,
            60.0,
            device.clock,
            fatal=(DeviceFailed,),
        )


def test_one_interrupted_call_does_not_decide() -> None:
    device = FakeDevice()
    interrupted = iter([0.0, 0.0, 0.0, 5.0])

    def late(jobs: int) -> None:
        device.now_s += next(interrupted, 0.0)

    assert device.choose(device.way("graphs", 0.5, raises=late)).name == "graphs"


@pytest.mark.parametrize("others", [[], [0.5]])
def test_eager_alone_takes_one_call_of_each_size(others: Sequence[float]) -> None:
    device = FakeDevice()
    choice = device.choose(*(device.way("wrong", factor, result=2.0) for factor in others))
    assert device.calls.count("eager") == len(SIZES), "eager is timed only if another way may take its place"
    assert choice.reason
