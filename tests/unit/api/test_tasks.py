"""What all doors resolve in the same way: how much one request may ask for, and its several pictures."""

from __future__ import annotations

import pytest

from stable_diffusion.api.tasks import consecutive_tasks
from stable_diffusion.core.errors import InvalidRequest
from stable_diffusion.core.requests import SEED_LIMIT
from tests.tasks import make_task


@pytest.mark.parametrize(
    ("side", "steps", "count"),
    [(512, 150, 10), (1024, 150, 1), (1024, 150, 2), (1024, 38, 10), (64, 150, 10)],
)
def test_what_one_request_may_ask_for(side: int, steps: int, count: int) -> None:
    assert len(consecutive_tasks(make_task(width=side, height=side, num_inference_steps=steps), count)) == count


@pytest.mark.parametrize(("side", "steps", "count"), [(1024, 150, 3), (1024, 39, 10), (520, 150, 10)])
def test_too_much_work_is_refused_with_the_numbers_and_the_limit(side: int, steps: int, count: int) -> None:
    told = f"{count} x {side} x {side} pixels x {steps} steps are {count * side * side * steps} pixel steps, at most 400000000 are allowed"
    with pytest.raises(InvalidRequest, match=told):
        consecutive_tasks(make_task(width=side, height=side, num_inference_steps=steps), count)


def test_each_of_several_pictures_has_the_next_seed() -> None:
    assert [task.seed for task in consecutive_tasks(make_task(seed=SEED_LIMIT - 2), 4)] == [SEED_LIMIT - 2, SEED_LIMIT - 1, 0, 1]
