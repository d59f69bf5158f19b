"""OpenAI's images API as the official client sees it, before a runner that does as it is told: no server."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from bentoml.exceptions import ServiceUnavailable
from PIL import Image
from starlette.applications import Starlette
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from stable_diffusion.api.context import Context
from stable_diffusion.api.openai import responses as openai_responses
from stable_diffusion.api.openai.routes import make_routes
from stable_diffusion.core.errors import GenerationFailed, QueueFull
from stable_diffusion.core.shutdown import Unfinished
from stable_diffusion.core.types import GeneratedImage, Progress, RequestContext
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from stable_diffusion.runner.client import RunnerClient
from stable_diffusion.runner.wire import pack_outcome, pack_progress, pack_taken_on
from stable_diffusion.state.folder import shared_folder
from stable_diffusion.state.jobs import new_job_id
from stable_diffusion.state.sqlite_jobs import SqliteJobs


@pytest.fixture(autouse=True)
def _shared_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SD_SHARED_FOLDER", str(tmp_path / "shared"))


Draws = Callable[[dict[str, Any]], AsyncGenerator[str, None]]


async def out_of_memory(_: dict[str, Any]) -> AsyncGenerator[str, None]:
    yield pack_taken_on()
    yield pack_outcome(GenerationFailed("not enough memory for 64x64"))


async def no_process(_: dict[str, Any]) -> AsyncGenerator[str, None]:
    raise ServiceUnavailable("refused")
    yield ""


async def full(_: dict[str, Any]) -> AsyncGenerator[str, None]:
    yield pack_outcome(QueueFull("200 pictures are waiting", retry_after_s=7))


async def drawn(_: dict[str, Any]) -> AsyncGenerator[str, None]:
    yield pack_taken_on()
    yield pack_progress(Progress(step=1, steps=2, position=0, seconds_left=1.0, preview=Image.new("RGB", (8, 8))))
    yield pack_outcome(GeneratedImage(Image.new("RGB", (64, 64)), None, "", "", device="cpu", dtype="float32"))


def http_client_of(draws: Draws, requests: list[str]) -> TestClient:
    def draw(packed: dict[str, Any]) -> AsyncGenerator[str, None]:
        requests.append(packed["task"]["prompt"])
        return draws(packed)

    async def is_ready(timeout: int) -> bool:
        return True

    runner = SimpleNamespace(txt2img=SimpleNamespace(async_stream=draw), runner_handle_is_ready=is_ready)
    client = RunnerClient(runner, SqliteJobs(shared_folder), Unfinished(grace_s=60))
    api = Starlette(routes=make_routes(Context(client, lambda: check_model(DEMO_FOLDER), lambda: "default-on")))

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await api({**scope, RequestContext.KEY: RequestContext(new_job_id())}, receive, send)

    return TestClient(application)


def client_of(draws: Draws, requests: list[str]) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="unused", http_client=http_client_of(draws, requests))


def test_a_picture_that_failed_is_a_server_error_that_the_client_does_not_pay_for_again() -> None:
    requests: list[str] = []
    with pytest.raises(openai.InternalServerError, match="not enough memory") as caught:
        client_of(out_of_memory, requests).images.generate(prompt="a red circle")
    assert (caught.value.type, caught.value.code, caught.value.param) == ("server_error", "generation_failed", None)
    assert len(requests) == 1


def test_a_model_process_that_is_gone_is_a_503_that_says_when_to_try_again() -> None:
    client = client_of(no_process, []).with_options(max_retries=0)
    with pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(prompt="a red circle", n=2)
    assert (caught.value.status_code, caught.value.code) == (503, "model_unavailable")
    assert caught.value.response.headers["retry-after"] == "60"


@pytest.mark.parametrize("stream", [False, True])
def test_a_queue_that_is_full_is_a_429_before_any_stream_begins(stream: bool) -> None:
    client = client_of(full, []).with_options(max_retries=0)
    with pytest.raises(openai.RateLimitError, match="200 pictures are waiting") as caught:
        client.images.generate(prompt="a red circle", stream=stream)
    assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("queue_full", "7")


def test_an_error_in_the_middle_of_a_stream_is_raised_by_the_client() -> None:
    stream = client_of(out_of_memory, []).images.generate(prompt="a red circle", stream=True, partial_images=1)
    with pytest.raises(openai.APIError, match="not enough memory") as caught:
        list(stream)
    assert (caught.value.type, caught.value.code) == ("server_error", "generation_failed")


def test_pictures_are_encoded_and_written_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def as_base64(content: bytes) -> str:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        written.append(str(Image.open(io.BytesIO(content)).size))
        return "picture"

    monkeypatch.setattr(openai_responses, "as_base64", as_base64)
    answer = client_of(drawn, []).images.generate(prompt="a red circle", n=2)
    assert answer.data
    assert [one.b64_json for one in answer.data] == ["picture"] * 2
    told = list(client_of(drawn, []).images.generate(prompt="a red circle", stream=True, partial_images=1))
    assert [event.b64_json for event in told] == ["picture"] * 2
    assert written == ["(64, 64)"] * 4


def test_a_second_mask_is_refused(input_picture: Image.Image) -> None:
    buffer = io.BytesIO()
    input_picture.save(buffer, "PNG")
    body = [(name, (f"{name}.png", buffer.getvalue(), "image/png")) for name in ("image", "mask", "mask")]
    refused = http_client_of(drawn, []).post("/v1/images/edits", files=body, data={"prompt": "a red circle"})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "mask: is given more than once"
