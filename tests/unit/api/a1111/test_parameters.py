"""A1111's bodies as requests of ours: samplers, defaults, what is ignored and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from stable_diffusion.api.a1111.images import read_initial_image
from stable_diffusion.api.a1111.parameters import (
    fitted_to_model,
    read_image_to_image,
    read_options,
    read_text_to_image,
    scheduler_asked_for,
    without_images,
)
from stable_diffusion.core.errors import InvalidRequest, NotFound
from stable_diffusion.core.schedulers import SCHEDULERS
from stable_diffusion.models.defaults import Defaults
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from stable_diffusion.server.openapi import document

DRAWN = {"prompt": "a red circle"}


@pytest.mark.parametrize(
    ("sampler", "schedule", "scheduler"),
    [
        ("", "", None),
        ("", "Automatic", None),
        ("Euler", "", "EulerDiscreteScheduler"),
        ("Euler a", "Automatic", "EulerAncestralDiscreteScheduler"),
        ("Euler a", "normal", "EulerAncestralDiscreteScheduler"),
        ("Euler", "Uniform", "EulerDiscreteScheduler"),
        ("DPM++ 2M", "", "DPMSolverMultistepScheduler"),
        ("DPM++ 2M", "automatic", "DPMSolverMultistepScheduler"),
        ("DPM++ 2M", "Karras", "DPMSolverMultistepScheduler Karras"),
        ("DPM++ 2M", "karras", "DPMSolverMultistepScheduler Karras"),
        ("DPM++ 2M Karras", "", "DPMSolverMultistepScheduler Karras"),
        ("DPM++ 2M Karras", "Karras", "DPMSolverMultistepScheduler Karras"),
        ("PLMS", "", "PNDMScheduler"),
        ("DDIM", "", "DDIMScheduler"),
        ("UniPC", "", "UniPCMultistepScheduler"),
        ("LMS", "", "LMSDiscreteScheduler"),
        ("Heun", "", "HeunDiscreteScheduler"),
        ("DPM2 a", "", "KDPM2AncestralDiscreteScheduler"),
        ("DPM2 a", "Karras", "KDPM2AncestralDiscreteScheduler Karras"),
        ("DPM++ SDE Karras", "", "DPMSolverSinglestepScheduler SDE Karras"),
        ("DPM++ 2M SDE", "exponential", "DPMSolverMultistepScheduler SDE Exponential"),
        ("DPM++ 2M SDE Heun", "Karras", "DPMSolverMultistepScheduler SDE Heun Karras"),
        ("DPM++ 3M SDE", "Automatic", "DPMSolverMultistepScheduler 3M SDE"),
        ("LCM", "", "LCMScheduler"),
        ("DDIM", "sgm_uniform", "DDIMScheduler Trailing"),
        ("Euler a", "SGM Uniform", "EulerAncestralDiscreteScheduler Trailing"),
        ("", "SGM Uniform", "DDIMScheduler Trailing"),
        ("Euler", "Karras", "EulerDiscreteScheduler"),
        ("DPM++ 2M", "Exponential", "DPMSolverMultistepScheduler"),
        ("Euler a", "karras", "EulerAncestralDiscreteScheduler"),
        ("", "Karras", "DPMSolverMultistepScheduler Karras"),
    ],
)
def test_a_sampler_and_its_noise_levels_are_one_noise_scheduler_here(sampler: str, schedule: str, scheduler: str | None) -> None:
    assert scheduler is None or scheduler in SCHEDULERS
    assert scheduler_asked_for(sampler, schedule) == scheduler


def test_an_unknown_sampler_is_a_404_that_lists_the_known_ones() -> None:
    with pytest.raises(
        NotFound, match=r"sampler_name: unknown scheduler 'DPM fast', allowed are PNDM, DDIM, Euler, Euler a, DPM\+\+ 2M"
    ) as caught:
        scheduler_asked_for("DPM fast", "Automatic")
    assert caught.value.status == 404


@pytest.mark.parametrize(("sampler", "schedule"), [("", "Polyexponential"), ("DPM++ 2M", "Beta"), ("DDIM", "DDIM"), ("Euler", "a")])
def test_unknown_noise_levels_are_refused(sampler: str, schedule: str) -> None:
    with pytest.raises(
        InvalidRequest, match=r"^scheduler: unknown noise levels .* allowed are Automatic, .*, Karras, Exponential, SGM Uniform$"
    ):
        scheduler_asked_for(sampler, schedule)


def test_a_missing_field_has_a1111s_default_but_what_depends_on_the_model_is_the_models() -> None:
    asked = read_text_to_image(DRAWN)
    assert asked.count == 1
    parameters = asked.parameters
    assert (parameters.num_inference_steps, parameters.guidance_scale, parameters.seed, parameters.scheduler) == (None, None, None, None)
    assert (parameters.width, parameters.height) == (None, None)
    assert read_image_to_image({**DRAWN, "init_images": ["x"]}).parameters.strength == 0.75


def test_null_is_as_good_as_a_missing_field_and_unknown_ones_are_ignored() -> None:
    nothing = dict.fromkeys(["seed", "sampler_name", "scheduler", "width", "script_name", "styles", "override_settings", "infotext"])
    unknown = {"s_churn": 0.5, "hr_scale": 2, "auth": "", "override_settings": {"eta_noise_seed_delta": 2, "deep": [[{}]]}}
    assert read_text_to_image({**DRAWN, **nothing, **unknown}).parameters == read_text_to_image(DRAWN).parameters


def test_numbers_as_text_are_numbers_and_sides_are_rounded_down() -> None:
    parameters = read_text_to_image({**DRAWN, "steps": "20", "cfg_scale": "4.5", "seed": 3.0, "width": 127, "height": 64}).parameters
    assert (parameters.num_inference_steps, parameters.guidance_scale, parameters.seed) == (20, 4.5, 3)
    assert (parameters.width, parameters.height) == (120, 64)


@pytest.mark.parametrize(("said", "clip_skip"), [({}, 1), ({"CLIP_stop_at_last_layers": 2}, 2), ({"CLIP_stop_at_last_layers": None}, 1)])
def test_clip_skip_is_an_option_of_the_request(said: dict[str, object], clip_skip: int) -> None:
    assert read_text_to_image({**DRAWN, "override_settings": said}).parameters.clip_skip == clip_skip


@pytest.mark.parametrize("layers", [13, -1, "two", 1.5])
def test_a_clip_skip_that_cannot_be_is_refused_in_a1111s_words(layers: object) -> None:
    with pytest.raises(InvalidRequest, match="CLIP_stop_at_last_layers|override_settings"):
        read_text_to_image({**DRAWN, "override_settings": {"CLIP_stop_at_last_layers": layers}})


def test_prompts_are_read_in_a1111s_syntax() -> None:
    assert read_text_to_image(DRAWN).parameters.prompt_syntax == "a1111"


@pytest.mark.parametrize(("sampler", "eta"), [("DDIM", 1.0), ("TCD", 1.0), ("Euler a", 0.0), ("", 0.0)])
def test_eta_which_clients_always_send_is_taken_where_the_sampler_has_it(sampler: str, eta: float) -> None:
    assert read_text_to_image({**DRAWN, "sampler_name": sampler, "eta": 1.0}).parameters.eta == eta


@pytest.mark.parametrize(("sent", "used"), [(7, 2.0), (2, 2.0), (1.5, 1.5), (0, 0.5), (None, None)])
def test_a_guidance_scale_that_the_model_is_not_for_becomes_the_nearest_that_it_is_for(sent: float | None, used: float | None) -> None:
    asked = read_text_to_image({**DRAWN, "cfg_scale": sent})
    turbo, usual = (replace(check_model(DEMO_FOLDER), defaults=defaults) for defaults in (Defaults(4, 1.0, (0.5, 2.0)), Defaults()))
    assert fitted_to_model(asked, turbo).parameters.guidance_scale == used
    assert fitted_to_model(asked, usual).parameters.guidance_scale == (7.0 if sent is None else sent)


@pytest.mark.parametrize(("sent", "used", "used_by_xl"), [(None, 1, 1), (1, 1, 1), (2, 2, 1), (3, 3, 2)])
def test_clip_skip_counts_from_the_second_to_last_layer_with_xl(sent: int | None, used: int, used_by_xl: int) -> None:
    asked = read_text_to_image({**DRAWN, "override_settings": {"CLIP_stop_at_last_layers": sent}})
    assert fitted_to_model(asked, check_model(DEMO_FOLDER)).parameters.clip_skip == used
    assert fitted_to_model(asked, replace(check_model(DEMO_FOLDER), is_xl=True)).parameters.clip_skip == used_by_xl


def test_seed_minus_one_is_random() -> None:
    assert read_text_to_image({**DRAWN, "seed": -1}).parameters.seed is None
    assert read_text_to_image({**DRAWN, "seed": 0}).parameters.seed == 0


def test_as_many_pictures_as_both_counts_say() -> None:
    assert read_text_to_image({**DRAWN, "batch_size": 2, "n_iter": 3}).count == 6


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompt": 5}, "prompt: must be a valid string"),
        ({"steps": 0}, "steps: must be greater than or equal to 1"),
        ({"steps": 151}, "steps: must be less than or equal to 150"),
        ({"steps": 2.5}, "steps: must be a valid integer"),
        ({"cfg_scale": 31}, "cfg_scale: must be less than or equal to 30"),
        ({"width": 63}, "width: must be greater than or equal to 64"),
        ({"height": 2056}, "height: must be less than or equal to 2048"),
        ({"sampler_name": "Euler", "scheduler": "KL Optimal"}, "scheduler: unknown noise levels 'KL Optimal', allowed are"),
        ({"sampler_name": "DDIM", "eta": 1.5}, "eta: must be less than or equal to 1"),
        ({"batch_size": 0}, "batch_size: must be greater than or equal to 1"),
        ({"batch_size": 11}, "batch_size: must be less than or equal to 10"),
        ({"batch_size": 4, "n_iter": 3}, "batch_size: batch_size * n_iter must be at most 10, got 12"),
        ({"enable_hr": True}, "enable_hr: a second pass at a larger size is not supported, send false"),
        ({"script_name": "X/Y/Z plot"}, "script_name: scripts are not supported, got 'X/Y/Z plot'"),
        (
            {"alwayson_scripts": {"ADetailer": {"args": [{"ad_model": "x"}]}}},
            "alwayson_scripts: scripts are not supported, got 'ADetailer'",
        ),
        (
            {"alwayson_scripts": {"ControlNet": {"args": [{"enabled": True}]}}},
            "alwayson_scripts: scripts are not supported, got 'ControlNet'",
        ),
        ({"infotext": "Steps: 20"}, "infotext: is not supported, use POST /reproduce"),
        ({"override_settings": {"sd_model_checkpoint": 5}}, "override_settings: must be a valid string"),
        ({"init_images": ["x", "y"]}, "init_images: must hold one image, got 2"),
        ({"resize_mode": 3}, "resize_mode: must be 0, 1 or 2, got 3 (resizing in latent space is not supported)"),
        ({"resize_mode": 4}, "resize_mode: must be less than or equal to 3"),
        ({"mask_blur": 65}, "mask_blur: must be less than or equal to 64"),
        ({"denoising_strength": -0.1}, "denoising_strength: must be greater than 0"),
        ({"denoising_strength": 1.5}, "denoising_strength: must be less than or equal to 1"),
        (
            {"denoising_strength": 0.1, "steps": 5},
            "denoising_strength 0.1 leaves no step to run out of 5: raise denoising_strength or steps",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_told_in_a1111s_words(changes: dict[str, object], told: str) -> None:
    about_pictures = {"init_images", "resize_mode", "mask_blur", "denoising_strength"} & set(changes)
    read = read_image_to_image if about_pictures else read_text_to_image
    with pytest.raises(InvalidRequest) as caught:
        read({**DRAWN, "init_images": ["x"], **changes})
    assert caught.value.message.startswith(told)


@pytest.mark.parametrize("changes", [{}, {"init_images": None}, {"init_images": []}])
def test_a_missing_picture_is_a_404(changes: dict[str, object]) -> None:
    with pytest.raises(NotFound, match="init_images: the image is missing"):
        read_image_to_image({**DRAWN, **changes})


def test_a_list_of_wrong_items_is_refused_at_the_first() -> None:
    for read, field in ((read_image_to_image, "init_images"), (read_text_to_image, "styles")):
        with pytest.raises(InvalidRequest) as caught:
            read({**DRAWN, field: [0] * 10_000})
        assert caught.value.message == f"{field}: must be a valid string"


def test_pictures_are_kept_no_longer_than_they_are_needed() -> None:
    for wanted, init_images, mask in ((False, [], ""), (True, ["x"], "y")):
        asked = read_image_to_image({**DRAWN, "init_images": ["x"], "mask": "y", "include_init_images": wanted})
        kept = without_images(asked.body)
        assert (kept.init_images, kept.mask) == (init_images, mask)


def test_enable_pnginfo_false_leaves_the_text_out_of_the_file() -> None:
    for said, metadata in ((False, False), (True, True), (None, True)):
        assert read_text_to_image({**DRAWN, "override_settings": {"enable_pnginfo": said}}).parameters.metadata is metadata
    assert read_text_to_image(DRAWN).parameters.metadata


def test_the_documented_limits_are_those_that_are_kept() -> None:
    fields = document("name", "1")["components"]["schemas"]["A1111ImageToImageBody"]["properties"]
    for name in ("steps", "cfg_scale", "width", "height"):
        for limit, beyond in (("minimum", -8), ("maximum", 8)):
            value = fields[name]["anyOf"][0][limit]
            read_text_to_image({**DRAWN, name: value})
            with pytest.raises(InvalidRequest, match=f"^{name}: must be"):
                read_text_to_image({**DRAWN, name: value + beyond})
    strength = fields["denoising_strength"]["anyOf"][0]
    assert (strength["minimum"], strength["maximum"]) == (0, 1)
    assert not {"minimum", "maximum", "exclusiveMaximum"} & fields["seed"]["anyOf"][0].keys()


@pytest.mark.parametrize(
    ("asked", "seed"),
    [(7, 7), (2**32 - 1, 2**32 - 1), (2**32, 0), (3088633670041979, 3088633670041979 % 2**32), (-2, 2**32 - 2), (-1, None)],
)
def test_seeds_of_any_size_are_taken(asked: int, seed: int | None) -> None:
    assert read_text_to_image({**DRAWN, "seed": asked}).parameters.seed == seed


@pytest.mark.parametrize("document", [{}, {"prompt": None}, {"prompt": ""}, {"prompt": "  "}])
def test_an_empty_prompt_is_taken_as_a1111_does(document: dict[str, Any]) -> None:
    assert read_text_to_image({"steps": 2, **document}).parameters.prompt == ""


@pytest.mark.parametrize("script", [{"args": []}, {}, {"args": [{"enabled": False, "model": "x"}]}, {"args": [None, {}]}, []])
def test_a_script_without_work_is_no_script(script: Any) -> None:
    assert read_text_to_image({**DRAWN, "alwayson_scripts": {"ControlNet": script}}).count == 1


def test_of_options_only_the_model_counts() -> None:
    assert read_options({"sd_model_checkpoint": "demo", "samples_format": "png"}).sd_model_checkpoint == "demo"
    assert read_options({}).sd_model_checkpoint is None


def test_the_documented_examples_are_valid_bodies() -> None:
    paths = document("name", "1")["paths"]
    bodies = {
        kind: paths[f"/sdapi/v1/{kind}"]["post"]["requestBody"]["content"]["application/json"]["example"] for kind in ("txt2img", "img2img")
    }
    assert read_text_to_image(bodies["txt2img"]).count == 2
    assert read_initial_image(read_image_to_image(bodies["img2img"]).body).size == (8, 8)
