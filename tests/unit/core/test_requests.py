"""Names, defaults and limits of a request, and what a wrong one is told."""

from __future__ import annotations

import pytest

from stable_diffusion.core.errors import InvalidRequest
from stable_diffusion.core.requests import parse_image_to_image, parse_text_to_image, random_seed
from stable_diffusion.core.schedulers import SCHEDULERS
from stable_diffusion.web.body import parse_json


def test_only_a_prompt_is_needed() -> None:
    request = parse_text_to_image({"prompt": "a red circle"})
    assert request.model_dump() == {
        "prompt": "a red circle",
        "negative_prompt": "",
        "height": None,
        "width": None,
        "num_inference_steps": None,
        "guidance_scale": None,
        "guidance_end": 1.0,
        "eta": 0.0,
        "preview_every_steps": 0,
        "seed": None,
        "scheduler": None,
        "prompt_syntax": "plain",
        "clip_skip": 1,
        "loras": [],
        "safety_check": None,
        "output_format": None,
        "metadata": True,
    }
    assert parse_image_to_image({"prompt": "a red circle"}).strength == 0.8


def test_prompts_are_cleaned_as_clip_expects_them() -> None:
    request = parse_text_to_image({"prompt": "  caf\u00c3\u00a9 &amp; cr\u00e8me \n", "negative_prompt": "\u2018dark\u2019"})
    assert request.prompt == "caf\u00e9 & cr\u00e8me"
    assert request.negative_prompt == "'dark'"


@pytest.mark.parametrize(
    ("changes", "field", "told"),
    [
        ({"prompt": ""}, "prompt", "must not be empty"),
        ({"prompt": "   "}, "prompt", "must not be empty"),
        ({"prompt": 7}, "prompt", "must be a valid string"),
        ({"prompt": None}, "prompt", "must be a valid string"),
        ({"prompt": "x" * 2001}, "prompt", "must have at most 2000 characters"),
        ({"negative_prompt": "x" * 2001}, "negative_prompt", "must have at most 2000 characters"),
        ({"height": 100}, "height", "must be a multiple of 8, 100 is not"),
        ({"height": 56}, "height", "must be greater than or equal to 64"),
        ({"width": 2056}, "width", "must be less than or equal to 2048"),
        ({"width": 64.0}, "width", "must be a valid integer"),
        ({"width": "64"}, "width", "must be a valid integer"),
        ({"num_inference_steps": 0}, "num_inference_steps", "must be greater than or equal to 1"),
        ({"num_inference_steps": 151}, "num_inference_steps", "must be less than or equal to 150"),
        ({"num_inference_steps": True}, "num_inference_steps", "must be a valid integer"),
        ({"guidance_scale": -0.1}, "guidance_scale", "must be greater than or equal to 0"),
        ({"guidance_scale": 30.5}, "guidance_scale", "must be less than or equal to 30"),
        ({"guidance_scale": float("inf")}, "guidance_scale", "must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale", "must be"),
        ({"guidance_end": -0.1}, "guidance_end", "must be greater than or equal to 0"),
        ({"guidance_end": 1.1}, "guidance_end", "must be less than or equal to 1"),
        ({"guidance_scale": "7"}, "guidance_scale", "must be a valid number"),
        ({"seed": -1}, "seed", "must be greater than or equal to 0"),
        ({"seed": 2**32}, "seed", "must be less than 4294967296"),
        ({"seed": 1.5}, "seed", "must be a valid integer"),
        ({"seed": True}, "seed", "must be a valid integer"),
        ({"safety_check": "no"}, "safety_check", "must be a valid boolean"),
        ({"safety_check": 0}, "safety_check", "must be a valid boolean"),
        ({"scheduler": "Magic"}, "scheduler", "unknown scheduler 'Magic', allowed are PNDM, DDIM, Euler"),
        ({"output_format": "gif"}, "output_format", "must be one of 'jpeg', 'png' or 'webp'"),
        ({"strength": 0.5}, "strength", "is not a known field, allowed are prompt, negative_prompt"),
        ({"steps": 5}, "steps", "is not a known field"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named_with_its_limit(changes: dict[str, object], field: str, told: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_text_to_image({"prompt": "a red circle"} | changes)
    assert caught.value.status == 400
    assert [problem.field for problem in caught.value.problems] == [field]
    assert caught.value.message.startswith(f"{field}: ")
    assert told in caught.value.message


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"strength": 0}, "strength: must be greater than 0"),
        ({"strength": 1.01}, "strength: must be less than or equal to 1"),
        ({"strength": 0.1, "num_inference_steps": 5}, "strength 0.1 leaves no step to run out of 5: raise strength or num_inference_steps"),
    ],
)
def test_a_strength_that_leaves_nothing_to_do_is_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_image_to_image({"prompt": "a red circle"} | changes)
    assert caught.value.message == told
    assert caught.value.problems[0].field == "strength"


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_text_to_image({"height": 7, "foo": 1})
    assert {problem.field for problem in caught.value.problems} == {"prompt", "height", "foo"}


def test_few_of_many_problems_are_told() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_text_to_image({str(number): number for number in range(1000)})
    assert len(caught.value.problems) == 20


@pytest.mark.parametrize(
    ("name", "known_as"),
    [
        ("PNDM", "PNDMScheduler"),
        ("plms", "PNDMScheduler"),
        ("DDIMScheduler", "DDIMScheduler"),
        ("euler", "EulerDiscreteScheduler"),
        ("Euler a", "EulerAncestralDiscreteScheduler"),
        ("euler_ancestral", "EulerAncestralDiscreteScheduler"),
        ("DPM++ 2M", "DPMSolverMultistepScheduler"),
        ("dpm++_2m_karras", "DPMSolverMultistepScheduler Karras"),
        ("UniPC", "UniPCMultistepScheduler"),
        ("LMS", "LMSDiscreteScheduler"),
        ("Heun", "HeunDiscreteScheduler"),
        ("dpm2_a", "KDPM2AncestralDiscreteScheduler"),
        ("dpm2 ancestral", "KDPM2AncestralDiscreteScheduler"),
        ("DPM++ singlestep", "DPMSolverSinglestepScheduler"),
        ("DPM++ SDE", "DPMSolverSinglestepScheduler SDE"),
        ("lcm", "LCMScheduler"),
        ("tcd", "TCDScheduler"),
        ("DDIM trailing", "DDIMScheduler Trailing"),
    ],
)
def test_schedulers_go_by_class_name_and_by_short_name(name: str, known_as: str) -> None:
    assert known_as in SCHEDULERS
    assert parse_text_to_image({"prompt": "x", "scheduler": name}).scheduler == known_as


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "body: not valid JSON, expecting value at line 1 column 1"),
        (b"{", "body: not valid JSON"),
        (b"[]", 'body: must be a JSON object, such as {"prompt": "a red circle"}'),
        (b"\xff\xfe", "body: not UTF-8"),
        (b'{"guidance_scale": NaN}', "guidance_scale: NaN is not a number in JSON"),
        (b'{"guidance_scale": -Infinity}', "guidance_scale: -Infinity is not a number in JSON"),
        (b'{"seed": 1, "seed": 2}', "seed is given more than once"),
        (
            b"{" + b",".join(b'"%d": 1' % number for number in range(5000)) + b"}",
            "body: a JSON object must have at most 64 names, got 5000",
        ),
        (b"[" * 10_000, "body: the JSON is nested too deeply or has a number with too many digits"),
        (b'{"prompt": [' + b"0," * 20_000 + b"0]}", "body: must have at most 16384 values, got about 20002"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "body: the JSON is nested too deeply or has a number with too many digits"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else "",
)
def test_json_is_read_strictly(body: bytes, told: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_json(body, "body")
    assert told in caught.value.message


def test_random_seeds_fit_into_32_bits_and_differ() -> None:
    seeds = {random_seed() for _ in range(50)}
    assert len(seeds) > 45
    assert all(0 <= seed < 2**32 for seed in seeds)
