"""What A1111's clients read, as far as it needs no server: progress and errors."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from stable_diffusion.api.a1111.images import UnreadablePicture
from stable_diffusion.api.a1111.parameters import TextToImageBody
from stable_diffusion.api.a1111.responses import error_response, images_response, progress_response, refusal
from stable_diffusion.core.errors import GenerationFailed, InvalidRequest, NotFound, ServiceError, TooLarge
from stable_diffusion.core.types import GeneratedImage, Progress, Task
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from stable_diffusion.state.job_record import JobRecord
from tests.tasks import make_task

MODEL = check_model(DEMO_FOLDER, name="demo")


def record(step: int, steps: int = 10) -> JobRecord:
    return JobRecord(
        id="a",
        index=0,
        task=make_task(),
        asynchronous=False,
        state="running",
        progress=Progress(0, step, steps, 1.5),
        is_estimated=True,
        preview_png=None,
        image_format=None,
        created_at=0.0,
        ended_at=None,
        outcome={},
        image=None,
    )


def test_idle_is_exactly_what_clients_wait_for() -> None:
    answer = progress_response([])
    assert json.dumps(answer["progress"]) == "0.0"
    assert answer == {
        "progress": 0.0,
        "eta_relative": 0.0,
        "state": {
            "skipped": False,
            "interrupted": False,
            "job": "",
            "job_count": 0,
            "job_timestamp": "0",
            "job_no": 0,
            "sampling_step": 0,
            "sampling_steps": 0,
        },
        "current_image": None,
        "textinfo": None,
    }


def test_progress_is_over_all_pictures_and_never_that_of_an_idle_server() -> None:
    answer = progress_response([record(5), record(2)])
    assert answer["progress"] == pytest.approx(0.35)
    assert answer["eta_relative"] == 1.5
    state = answer["state"]
    assert (state["job_count"], state["sampling_step"], state["sampling_steps"]) == (2, 5, 10)
    assert 0 < progress_response([record(0)])["progress"] < 0.1
    assert progress_response([record(10)])["progress"] < 1


@pytest.mark.parametrize(
    ("scheduler", "told"),
    [
        ("EulerAncestralDiscreteScheduler", "Automatic (Karras is not available for Euler a)"),
        ("DPMSolverMultistepScheduler Karras", "Karras"),
    ],
)
def test_info_says_with_which_noise_levels_it_was_drawn(scheduler: str, told: str) -> None:
    answer = answered({"scheduler": "karras"}, replace(make_task(), scheduler=scheduler))
    assert answer["extra_generation_params"] == {"Schedule type": told}


def test_of_a_flagged_picture_nothing_is_told() -> None:
    assert answered({}, make_task(), flagged=True)["infotexts"] == [""]
    assert "Steps: " in answered({}, replace(make_task(), metadata=False), flagged=False)["infotexts"][0], "only the file has none"


@pytest.mark.parametrize(
    ("sent", "used", "comments"),
    [(7, 2.0, ["cfg_scale: the model does not support 7, 2 was used"]), (2, 2.0, []), (None, 1.0, [])],
)
def test_info_says_where_another_guidance_scale_was_used(sent: float | None, used: float, comments: list[str]) -> None:
    answer = answered({"cfg_scale": sent}, make_task(guidance_scale=used))
    assert (answer["cfg_scale"], answer["comments"]) == (used, comments)


def test_the_answer_repeats_the_fields_with_the_values_that_the_model_gave_them() -> None:
    picture = GeneratedImage(Image.new("RGB", (64, 64)), None, "", "")
    body = TextToImageBody.model_validate({"cfg_scale": 7})
    echo = images_response(body, [make_task(num_inference_steps=4, guidance_scale=2.0)], [picture], MODEL)["parameters"]
    assert (echo["steps"], echo["cfg_scale"]) == (4, 7)


def answered(fields: dict[str, object], task: Task, flagged: bool | None = None) -> dict[str, Any]:
    picture = GeneratedImage(Image.new("RGB", (64, 64)), flagged, "", "")
    info: dict[str, Any] = json.loads(images_response(TextToImageBody.model_validate(fields), [task], [picture], MODEL)["info"])
    return info


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequest("x"), 422),
        (UnreadablePicture("x"), 400),
        (NotFound("x"), 404),
        (TooLarge("x"), 413),
        (GenerationFailed("x"), 500),
    ],
)
def test_errors_have_a1111s_form_and_statuses(error: ServiceError, status: int) -> None:
    response = error_response(error)
    assert response.status_code == status
    assert json.loads(bytes(response.body)) == {"error": type(error).__name__, "detail": "x", "body": "", "errors": "x"}


def test_a_refusal_has_the_same_form() -> None:
    response = refusal(405, "method_not_allowed", "x", {"Allow": "POST"})
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert json.loads(bytes(response.body)) == {"error": "MethodNotAllowed", "detail": "x", "body": "", "errors": "x"}
