"""How much is taken on: `stable_diffusion/engine/workload.py`, with jobs that nobody draws."""

from __future__ import annotations

import math

import pytest

from stable_diffusion.core.errors import DeadlineExceeded, QueueFull
from stable_diffusion.engine.admission import NO_LIMITS, QueueLimits, Size, StepTimes, Workload
from stable_diffusion.engine.job import Job
from tests.tasks import make_task

NATIVE = (64, 64)
STEP_S = 0.1


def job(owner: str = "somebody", steps: int = 50, side: int = 64, scheduler: str = "DDIMScheduler") -> Job:
    return Job(make_task(num_inference_steps=steps, width=side, height=side, scheduler=scheduler), lambda outcome: None, owner=owner)


def workload(seconds: float = math.inf, images: float = math.inf, batch_limit: int = 1) -> Workload:
    made = Workload(QueueLimits(seconds, images), lambda size: batch_limit)
    made.note_step(NATIVE, 1, STEP_S)
    made.note_step(NATIVE, batch_limit, STEP_S)
    return made


def fill(full: Workload, owner: str = "somebody", steps: int = 50) -> int:
    """How many jobs of an owner are taken on, and then no more."""
    taken = 0
    while True:
        try:
            full.take(job(owner, steps), 3600)
        except QueueFull:
            return taken
        taken += 1


def refusal(full: Workload, owner: str = "somebody") -> QueueFull:
    with pytest.raises(QueueFull) as caught:
        full.take(job(owner), 3600)
    return caught.value


def test_work_is_taken_on_until_there_is_so_much_of_it() -> None:
    full = workload(seconds=20)
    assert fill(full) == 5, "50 steps of 0.1 s are 5 s; the one that goes over 20 s is the last"
    assert full.seconds() == pytest.approx(25)


def test_work_counts_by_its_steps_and_by_what_shares_them() -> None:
    assert fill(workload(seconds=20), steps=10) == 21
    assert fill(workload(seconds=20, batch_limit=4)) == 17, "four at a time in the same time"


def test_a_picture_that_alone_is_more_than_the_limit_is_taken_on_when_nothing_waits() -> None:
    assert fill(workload(seconds=1)) == 1


def test_pictures_are_counted_too() -> None:
    full = workload(images=3)
    assert fill(full, steps=1) == 3


def test_who_is_refused_is_told_when_the_device_will_have_done_enough() -> None:
    full = workload(seconds=20)
    fill(full)
    assert refusal(full).retry_after_s == 5, "of 25 s"
    assert "5 images, about 25 s of work" in refusal(full).message


def test_who_is_refused_for_the_number_is_told_when_the_next_should_be_done() -> None:
    full = workload(images=4)
    fill(full)
    assert refusal(full).retry_after_s == 5, "four pictures in 20 s"


def test_time_to_retry_is_at_least_a_second() -> None:
    full = workload(images=1)
    full.take(job(steps=1), 3600)
    assert refusal(full).retry_after_s == 1


def test_one_owner_who_fills_the_queue_does_not_keep_others_out() -> None:
    full = workload(seconds=20)
    fill(full, "greedy")
    assert fill(full, "other") == 2, "10 of 20 s, and the one that goes over"
    refusal(full, "greedy")


def test_many_owners_do_not_make_the_queue_endless() -> None:
    full = workload(seconds=20)
    for number in range(100):
        fill(full, f"{number}")
    assert full.seconds() <= 2 * 20 + 5
    full = workload(images=10)
    for number in range(100):
        fill(full, f"{number}")
    assert full.seconds() <= 20 * 5


def test_what_has_ended_makes_room() -> None:
    full = workload(images=1)
    first = job()
    full.take(first, 3600)
    refusal(full)
    full.leave(first)
    full.leave(first)
    assert full.seconds() == 0
    full.take(job(), 3600)


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    empty = workload()
    with pytest.raises(DeadlineExceeded, match=r"would take about 5\.0 s and may take 4\.00 s"):
        empty.take(job(), 4)
    empty.take(job(), 6)


def test_a_deadline_counts_the_work_of_others_as_far_as_it_is_done_before() -> None:
    full = workload()
    for _ in range(10):
        full.take(job("many"), 3600)
    with pytest.raises(DeadlineExceeded, match=r"about 10\.0 s"):
        full.take(job("one"), 9)
    full.take(job("one"), 11)
    with pytest.raises(DeadlineExceeded, match=r"about 60\.0 s"):
        full.take(job("many"), 50)


def test_a_short_picture_is_not_refused_for_the_owners_long_ones_which_it_goes_before() -> None:
    full = workload()
    for _ in range(10):
        full.take(job("somebody", 50), 3600)
    full.take(job("somebody", 4), 2)
    with pytest.raises(DeadlineExceeded, match=r"about 55\.4 s"):
        full.take(job("somebody", 50), 20)


def test_of_many_sizes_the_native_one_and_the_last_are_remembered() -> None:
    times = StepTimes()
    for side in range(64, 64 + 8 * 100, 8):
        times.note((side, 64), 1, side / 64)
    assert times.is_known((64, 64))
    assert times.is_known((64 + 8 * 99, 64))
    assert not times.is_known((72, 64))
    assert times.seconds((72, 64), 1) == pytest.approx(72 / 64)


def test_nobody_is_refused_for_a_size_of_which_no_step_was_measured() -> None:
    workload().take(job(side=1024), 0.1)


def test_a_step_of_second_order_counts_twice() -> None:
    assert fill(workload(seconds=20)) == 5
    full = workload(seconds=20)
    full.take(job(scheduler="HeunDiscreteScheduler"), 3600)
    assert full.seconds() == pytest.approx(10)


@pytest.mark.parametrize(
    ("size", "jobs", "expected"),
    [
        ((64, 64), 1, 0.1),
        ((64, 64), 4, 0.2),
        ((64, 64), 8, 0.4),
        ((128, 128), 1, 0.4),
        ((64, 64), 3, 0.15),
        ((512, 512), 2, 10.5),
        ((512, 512), 1, 5.25),
    ],
)
def test_what_was_not_measured_is_taken_from_the_nearest_that_was(size: Size, jobs: int, expected: float) -> None:
    times = StepTimes()
    times.note((64, 64), 1, 0.1)
    times.note((64, 64), 4, 0.2)
    times.note((512, 512), 2, 10.0)
    times.note((512, 512), 2, 20.0)
    assert times.seconds(size, jobs) == pytest.approx(expected)


def test_before_anything_was_measured_nothing_is_refused() -> None:
    unknown = Workload(QueueLimits(1, 100), lambda size: 1)
    for _ in range(50):
        unknown.take(job(), 0.001)
    assert unknown.seconds() == 0
    assert NO_LIMITS.seconds == math.inf


@pytest.mark.parametrize(("batch_limit", "expected"), [(1, 64 * 64 / 0.1), (4, 4 * 64 * 64 / 0.1)])
def test_the_speed_is_that_of_full_steps_at_the_native_size_whatever_else_was_measured(batch_limit: int, expected: float) -> None:
    measured = workload(batch_limit=batch_limit)
    measured.note_step((512, 512), 1, 60.0)
    assert measured.pixel_steps_per_s() == pytest.approx(expected)


def test_before_anything_was_measured_the_speed_is_unknown() -> None:
    assert Workload(NO_LIMITS, lambda size: 1).pixel_steps_per_s() == 0
