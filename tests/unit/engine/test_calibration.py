"""The cap follows from measured step times: `stable_diffusion/engine/calibration.py`, with made-up curves."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from stable_diffusion.engine.calibration import BatchLimit, batch_limit_for_size, choose_batch_limit


def launch_bound(jobs: int) -> float:
    """Measured on the demo model with a prototype: 42 ms for one job with guidance, 89 for eight."""
    return 0.036 + 0.0065 * jobs


def full_with_one(jobs: int) -> float:
    return 0.145 * jobs


def test_a_flat_throughput_gives_one_job_at_a_time_and_says_so() -> None:
    batch_limit = choose_batch_limit(full_with_one, 10)
    assert batch_limit.jobs == 1
    assert batch_limit.reason == "sharing a step gains 1.00x at most (1: 145 ms, 2: 290 ms, 4: 580 ms; 4 jobs gain nothing more)"


def test_a_launch_bound_device_gets_the_knee_and_not_the_largest_batch() -> None:
    batch_limit = choose_batch_limit(launch_bound, 32)
    # 32 jobs in 244 ms are the best measured; 16 in 140 ms reach 87 % of that, which is too little.
    assert batch_limit.jobs == 32
    saturating = choose_batch_limit(lambda jobs: 0.04 if jobs <= 4 else 0.01 * jobs, 32)
    assert saturating.jobs == 4
    assert "4.0x the throughput of one at a time" in saturating.reason


def test_one_unlucky_measurement_does_not_end_the_search() -> None:
    def interrupted_at_eight(jobs: int) -> float:
        return launch_bound(jobs) * (2.5 if jobs == 8 else 1)

    assert choose_batch_limit(interrupted_at_eight, 16).jobs == 16


def test_a_gain_that_is_not_worth_waiting_for_is_not_taken() -> None:
    # 1.07x and 1.14x: still rising at each doubling, and below 1.15x in the end.
    times = {1: 0.100, 2: 0.187, 4: 0.351}
    assert choose_batch_limit(lambda jobs: times[jobs], 4).jobs == 1


def test_memory_lowers_the_cap() -> None:
    def out_of_memory_at_eight(jobs: int) -> float | None:
        return launch_bound(jobs) if jobs < 8 else None

    batch_limit = choose_batch_limit(out_of_memory_at_eight, 10)
    assert batch_limit.jobs == 4
    assert "8 jobs do not fit into memory" in batch_limit.reason


def test_not_even_one_job_fitting_is_left_to_the_request_that_finds_out() -> None:
    assert choose_batch_limit(lambda jobs: None, 10) == BatchLimit(1, "1 jobs do not fit into memory", limited_by_memory=True)


def test_a_slow_device_is_not_measured_any_longer() -> None:
    asked: list[int] = []

    def slow(jobs: int) -> float:
        asked.append(jobs)
        return 16.0 * jobs

    assert choose_batch_limit(slow, 10) == BatchLimit(1, "a step of one job takes 16.0 s, so the device is full with one")
    assert asked == [1]


@pytest.mark.parametrize("curve", [full_with_one, lambda jobs: 16.0 * jobs, lambda jobs: None])
@pytest.mark.parametrize("max_batch_size", [1, 2, 10])
def test_no_configuration_makes_it_one_in_silence(curve: Callable[[int], float | None], max_batch_size: int) -> None:
    batch_limit = choose_batch_limit(curve, max_batch_size)
    assert batch_limit.jobs == 1
    assert batch_limit.reason


def test_the_largest_batch_is_measured_although_it_is_no_power_of_two() -> None:
    asked: list[int] = []

    def curve(jobs: int) -> float:
        asked.append(jobs)
        return 0.04

    assert choose_batch_limit(curve, 10).jobs == 10
    assert asked == [1, 2, 4, 8, 10]


def test_larger_pictures_share_less_and_smaller_ones_more() -> None:
    four = BatchLimit(4, "")
    assert batch_limit_for_size(four, 512 * 512, 512 * 512, 10) == 4
    assert batch_limit_for_size(four, 512 * 512, 1024 * 1024, 10) == 1
    assert batch_limit_for_size(four, 512 * 512, 2048 * 2048, 10) == 1
    assert batch_limit_for_size(four, 512 * 512, 256 * 256, 10) == 10
    assert batch_limit_for_size(BatchLimit(1, ""), 512 * 512, 256 * 256, 10) == 4
