"""`/status` before there is a runner that can draw, which a started server shows for a moment only."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from stable_diffusion.api.context import Context
from stable_diffusion.api.status.routes import make_routes
from stable_diffusion.core.shutdown import Unfinished
from stable_diffusion.models.defaults import Defaults
from stable_diffusion.models.folder import DEMO_FOLDER, ModelFolder, check_model
from stable_diffusion.runner import readiness as readiness_module
from stable_diffusion.runner.client import RunnerClient
from stable_diffusion.runner.readiness import Readiness
from stable_diffusion.state.folder import shared_folder
from stable_diffusion.state.runner_status import RunnerState
from stable_diffusion.state.sqlite_jobs import SqliteJobs


class Runner:
    """Answers, does not, or cannot be reached: what `/readyz` asks of BentoML's runner."""

    def __init__(self, answer: bool | Exception) -> None:
        self.answer = answer

    async def runner_handle_is_ready(self, timeout: int) -> bool:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SD_SHARED_FOLDER", str(tmp_path / "shared"))
    return tmp_path / "shared"


def ask(path: str, answer: bool | Exception = True, model: ModelFolder | None = None) -> Any:
    model = model or check_model(DEMO_FOLDER)
    client = RunnerClient(Runner(answer), SqliteJobs(shared_folder), Unfinished(grace_s=60))
    response = TestClient(Starlette(routes=make_routes(Context(client, lambda: model, lambda: "default-on")))).get(path)
    assert response.status_code == 200
    return response.json()


def test_before_a_runner_has_said_anything_there_is_none() -> None:
    status = ask("/status", answer=False)
    assert (status["ready"], status["stage"], status["runners"]) == (False, "starting", [])
    assert status["model"]["name"] == "model"


def test_a_runner_that_answers_is_ready_though_it_could_not_write_down_how_far_it_is() -> None:
    status = ask("/status")
    assert (status["ready"], status["stage"], status["runners"]) == (True, "ready", [])


@pytest.mark.parametrize("stage", ["starting", "loading weights", "warming up", "measuring the cap"])
def test_a_runner_that_loads_says_how_far_it_is(stage: Any) -> None:
    RunnerState(1, "fp16", "demo").enter(stage)
    status = ask("/status")
    assert status["ready"] is False
    [runner] = status["runners"]
    assert (runner["stage"], runner["precision"], runner["device"], runner["dtype"], runner["caps"]) == (stage, "fp16", None, None, [])
    assert runner["prediction_type"] is None


@pytest.mark.parametrize(("answer", "ready"), [(True, True), (False, False), (aiohttp.ClientError(), False)])
def test_a_server_is_ready_only_if_the_runner_answers_too(answer: bool | Exception, ready: bool) -> None:
    RunnerState(1, "fp32", "demo").enter("ready")
    RunnerState(2, "fp32", "demo").enter("warming up")
    status = ask("/status", answer)
    assert (status["ready"], status["stage"]) == (ready, "ready" if ready else "not answering")
    assert [runner["stage"] for runner in status["runners"]] == ["ready", "warming up"]


def test_the_model_process_is_asked_once_however_many_ask_at_a_time_and_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    RunnerState(1, "fp32", "demo").enter("ready")
    asked: list[int] = []

    class Counting:
        async def runner_handle_is_ready(self, timeout: int) -> bool:
            asked.append(timeout)
            await asyncio.sleep(0.05)
            return len(asked) == 1

    async def ask_often() -> None:
        readiness = Readiness(Counting())
        assert await asyncio.gather(*(readiness.is_ready() for _ in range(50))) == [True] * 50
        assert await readiness.is_ready()
        assert asked == [5]
        monkeypatch.setattr(readiness_module, "_ASK_INTERVAL_S", 0.0)
        assert not await readiness.is_ready()
        assert asked == [5, 5]

    asyncio.run(ask_often())


def test_one_who_leaves_takes_the_answer_from_nobody() -> None:
    RunnerState(1, "fp32", "demo").enter("ready")

    class Slow:
        async def runner_handle_is_ready(self, timeout: int) -> bool:
            await asyncio.sleep(0.1)
            return True

    async def ask_and_leave() -> bool:
        readiness = Readiness(Slow())
        leaving = asyncio.ensure_future(readiness.is_ready())
        staying = asyncio.ensure_future(readiness.is_ready())
        await asyncio.sleep(0.05)
        leaving.cancel()
        return await staying

    assert asyncio.run(ask_and_leave())


def test_whoever_asks_is_told_what_is_checked_and_how_much_one_request_may_ask_for() -> None:
    capabilities = ask("/capabilities")
    assert capabilities["safety"] == {"policy": "default-on", "has_checker": False}
    assert capabilities["max_pixel_steps"] == 400_000_000


def test_the_models_own_defaults_and_limits_are_told() -> None:
    fields = ask("/capabilities")["fields"]
    assert fields["num_inference_steps"] == {"default": 50, "minimum": 1, "maximum": 150}
    assert fields["guidance_scale"] == {"default": 7.5, "minimum": 0, "maximum": 30}
    model = dataclasses.replace(check_model(DEMO_FOLDER), defaults=Defaults(4, 1.0, (0.5, 2.0)), scheduler="LCMScheduler")
    capabilities = ask("/capabilities", model=model)
    assert capabilities["default_scheduler"] == "LCMScheduler"
    assert capabilities["fields"]["num_inference_steps"]["default"] == 4
    assert capabilities["fields"]["guidance_scale"] == {"default": 1.0, "minimum": 0.5, "maximum": 2.0}


def test_a_model_that_only_inpaints_says_so() -> None:
    model = dataclasses.replace(check_model(DEMO_FOLDER), only_inpaints=True)
    assert ask("/capabilities", model=model)["kinds"] == ["inpaint"]
