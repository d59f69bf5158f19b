"""What all doors resolve in the same way: how much one request may ask for, and its several pictures."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from stable_diffusion.api.tasks import consecutive_tasks, image_task, text_task, with_previews
from stable_diffusion.core.errors import InvalidRequest
from stable_diffusion.core.limits import SEED_LIMIT
from stable_diffusion.core.requests import parse_image_to_image, parse_text_to_image
from stable_diffusion.models.defaults import Defaults
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from tests.tasks import make_task, served


@pytest.mark.parametrize(
    ("side", "steps", "count"),
    [(512, 150, 10), (1024, 150, 1), (1024, 150, 2), (1024, 38, 10), (64, 150, 10)],
)
def test_what_one_request_may_ask_for(side: int, steps: int, count: int) -> None:
    assert len(consecutive_tasks(make_task(width=side, height=side, num_inference_steps=steps), count, check_model(DEMO_FOLDER))) == count


@pytest.mark.parametrize(("side", "steps", "count"), [(1024, 150, 3), (1024, 39, 10), (520, 150, 10)])
def test_too_much_work_is_refused_with_the_numbers_and_the_limit(side: int, steps: int, count: int) -> None:
    told = f"{count} x {side} x {side} pixels x {steps} steps are {count * side * side * steps} pixel steps, at most 400000000 are allowed"
    with pytest.raises(InvalidRequest, match=told):
        consecutive_tasks(make_task(width=side, height=side, num_inference_steps=steps), count, check_model(DEMO_FOLDER))


@pytest.mark.parametrize(("native", "most", "pixel_steps"), [(64, 1024, 400), (512, 1024, 400), (768, 1024, 800), (1024, 2048, 1600)])
def test_a_model_for_large_images_allows_larger_sides_and_as_many_images(native: int, most: int, pixel_steps: int) -> None:
    model = replace(check_model(DEMO_FOLDER), native_width=native, native_height=native)
    assert (model.max_side, model.max_pixel_steps) == (most, pixel_steps * 10**6)
    assert text_task(parse_text_to_image({"prompt": "a", "width": most, "height": 64}), served(model)).width == most
    for field in ("width", "height"):
        if most < 2048:
            with pytest.raises(InvalidRequest, match=f"{field}: must be at most {most} with the model model, got {most + 8}"):
                text_task(parse_text_to_image({"prompt": "a", field: most + 8}), served(model))
    wide = Image.new("RGB", (4000, 40))
    assert image_task(parse_image_to_image({"prompt": "a"}), served(model), wide).width <= most
    assert image_task(parse_image_to_image({"prompt": "a", "height": 64}), served(model), wide).width == most


def test_each_of_several_pictures_has_the_next_seed() -> None:
    tasks = consecutive_tasks(make_task(seed=SEED_LIMIT - 2), 4, check_model(DEMO_FOLDER))
    assert [task.seed for task in tasks] == [
        SEED_LIMIT - 2,
        SEED_LIMIT - 1,
        0,
        1,
    ]


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


FEW_STEPS = replace(check_model(DEMO_FOLDER), defaults=Defaults(4, 1.0, (0.5, 2.0)), scheduler="LCMScheduler")


def test_what_a_request_leaves_open_is_the_models() -> None:
    open_task = text_task(parse_text_to_image({"prompt": "x"}), served(FEW_STEPS))
    assert (open_task.num_inference_steps, open_task.guidance_scale, open_task.scheduler) == (4, 1.0, "LCMScheduler")
    fields = {"prompt": "x", "num_inference_steps": 7, "guidance_scale": 2.0, "scheduler": "TCD"}
    task = text_task(parse_text_to_image(fields), served(FEW_STEPS))
    assert (task.num_inference_steps, task.guidance_scale, task.scheduler) == (7, 2.0, "TCDScheduler")


@pytest.mark.parametrize("scale", [0.4, 2.1, 7.5])
def test_a_guidance_scale_that_the_model_is_not_for_is_refused_with_the_range(scale: float) -> None:
    with pytest.raises(InvalidRequest, match=f"guidance_scale: must be from 0.5 to 2 with the model model, got {scale}") as caught:
        text_task(parse_text_to_image({"prompt": "x", "guidance_scale": scale}), served(FEW_STEPS))
    assert caught.value.problems[0].field == "guidance_scale"


def test_a_strength_that_leaves_none_of_the_models_steps_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="strength 0.2 leaves no step to run out of 4") as caught:
        image_task(parse_image_to_image({"prompt": "x", "strength": 0.2}), served(FEW_STEPS), Image.new("RGB", (64, 64)))
    assert caught.value.problems[0].field == "strength"


@pytest.mark.parametrize(
    ("scheduler", "takes_it"), [("DDIM", True), ("DDIM trailing", True), ("TCD", True), ("Euler a", False), (None, False)]
)
def test_eta_is_refused_where_it_would_have_no_effect(scheduler: str | None, takes_it: bool) -> None:
    parameters = parse_text_to_image({"prompt": "x", "scheduler": scheduler, "eta": 0.5})
    if takes_it:
        assert text_task(parameters, served(check_model(DEMO_FOLDER))).eta == 0.5
    else:
        with pytest.raises(InvalidRequest, match="eta: only DDIM and TCD take it, (Euler a|PNDM) does not"):
            text_task(parameters, served(check_model(DEMO_FOLDER)))
