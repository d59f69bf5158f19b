"""What A1111's clients read, as far as it needs no server: progress and errors."""

from __future__ import annotations

import base64
import io
import json

import pytest
from PIL import Image

from stable_diffusion.a1111_answers import error_response, progress_answer
from stable_diffusion.a1111_pictures import UnreadablePicture
from stable_diffusion.engine.job import Progress
from stable_diffusion.errors import GenerationFailed, InvalidRequest, NotFound, ServiceError, TooLarge
from stable_diffusion.jobs import JobRecord
from tests.conftest import make_task


def record(step: int, steps: int = 10, preview: Image.Image | None = None) -> JobRecord:
    return JobRecord(
        id="a",
        index=0,
        task=make_task(),
        unattended=False,
        state="running",
        progress=Progress(0, step, steps, 1.5),
        preview=preview,
        created_at=0.0,
        ended_at=None,
        outcome={},
        picture=None,
    )


def test_idle_is_exactly_what_clients_wait_for() -> None:
    answer = progress_answer([], with_picture=True)
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
    answer = progress_answer([record(5), record(2)], with_picture=True)
    assert answer["progress"] == pytest.approx(0.35)
    assert answer["eta_relative"] == 1.5
    state = answer["state"]
    assert (state["job_count"], state["sampling_step"], state["sampling_steps"]) == (2, 5, 10)
    assert 0 < progress_answer([record(0)], with_picture=True)["progress"] < 0.1
    assert progress_answer([record(10)], with_picture=True)["progress"] < 1


def test_a_preview_is_a_picture_of_the_full_size_unless_it_is_not_wanted() -> None:
    jobs = [record(1), record(5, preview=Image.new("RGB", (8, 8), "red"))]
    answer = progress_answer(jobs, with_picture=True)
    assert Image.open(io.BytesIO(base64.b64decode(answer["current_image"]))).size == (64, 64)
    assert progress_answer(jobs, with_picture=False)["current_image"] is None


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
