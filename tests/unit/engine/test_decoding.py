"""How many images are decoded together: `stable_diffusion/engine/decoding.py`, with made-up times."""

from __future__ import annotations

import pytest

from stable_diffusion.engine.decoding import count_to_decode, useful_counts

H200 = {1: 0.0212, 2: 0.034, 4: 0.0617}


def test_numbers_that_take_less_time_for_each_image_are_useful() -> None:
    assert useful_counts(lambda count: H200[count]) == H200


@pytest.mark.parametrize("seconds", [lambda count: 0.02 * count, lambda count: 0.02 * count * (0.97 if count > 1 else 1)])
def test_a_device_that_is_full_with_one_image_decodes_one_by_one(seconds: object) -> None:
    assert useful_counts(seconds) == {1: 0.02}  # type: ignore[arg-type]


def test_what_does_not_fit_or_differs_is_not_useful() -> None:
    assert useful_counts(lambda count: H200[count] if count < 4 else None) == {1: 0.0212, 2: 0.034}
    assert useful_counts(lambda count: None) == {}


def test_a_slow_device_is_not_measured_any_longer() -> None:
    asked: list[int] = []

    def slow(count: int) -> float:
        asked.append(count)
        return 3.0

    assert useful_counts(slow) == {1: 3.0}
    assert asked == [1]


@pytest.mark.parametrize(
    ("waiting", "most_s", "count"),
    [(1, None, 1), (3, None, 2), (9, None, 4), (9, 0.05, 2), (9, 0.0617, 4), (9, 0.03, 1), (9, 0.001, 1)],
)
def test_as_many_are_decoded_as_a_step_of_others_takes_and_at_least_one(waiting: int, most_s: float | None, count: int) -> None:
    assert count_to_decode(H200, waiting, 1.0, most_s) == count


def test_smaller_images_take_less_time_and_larger_ones_are_decoded_one_by_one() -> None:
    assert count_to_decode(H200, 4, 0.25, 0.02) == 4
    assert count_to_decode(H200, 4, 4.0, None) == 1
    assert count_to_decode({}, 4, 1.0, None) == 1
