"""What all doors resolve in the same way: how much one request may ask for, and its several pictures."""

from __future__ import annotations

import pytest

from stable_diffusion.api.tasks import consecutive_tasks, text_task, with_previews
from stable_diffusion.core.errors import InvalidRequest
from stable_diffusion.core.requests import SEED_LIMIT, parse_text_to_image
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from tests.tasks import make_task, served


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


def test_a_server_that_checks_every_image_sends_no_previews() -> None:
    with pytest.raises(InvalidRequest, match="sends no previews"):
        with_previews(make_task(), 1, "always")
    assert with_previews(make_task(), 0, "always").preview_every_steps == 0
    assert with_previews(make_task(), 3, "default-on").preview_every_steps == 3


def test_a_request_for_previews_is_refused_where_every_image_is_checked() -> None:
    model = check_model(DEMO_FOLDER)
    parameters = parse_text_to_image({"prompt": "a red circle", "preview_every_steps": 2})
    assert text_task(parameters, served(model)).preview_every_steps == 2
    with pytest.raises(InvalidRequest, match="sends no previews"):
        text_task(parameters, served(model, "always"))
