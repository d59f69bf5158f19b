"""The content of a request's log line, without a server; `tests/http/test_request_log.py` tests a real one."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_diffusion.core import journal
from stable_diffusion.core.errors import Cancelled, GenerationFailed, ServiceError, TooManyJobs
from stable_diffusion.core.types import GeneratedImage, RequestContext, Task
from stable_diffusion.server.middleware import RequestLog

TASK = Task(
    kind="txt2img",
    prompt="a secret",
    negative_prompt="",
    width=64,
    height=72,
    num_inference_steps=20,
    guidance_scale=7.5,
    seed=7,
    scheduler="PNDM",
    safety_check=True,
)
NOISY = 'line\nbreak "quoted"\x00\x1b[31m\u2028\ud800'


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    """Let the log go to the standard output that the test captures; restore its handlers afterwards."""
    logger = logging.getLogger("stable_diffusion.requests")
    before = logger.handlers, logger.propagate
    yield
    logger.handlers, logger.propagate = before


def image(flagged: bool | None = False, waited_s: float = 0.25) -> GeneratedImage:
    return GeneratedImage(Image.new("RGB", (8, 8)), flagged, "", "", waited_s=waited_s)


def lines(
    capsys: pytest.CaptureFixture[str], app: ASGIApp, job_in_path: str | None = None, with_prompts: bool = False, **scope: Any
) -> list[dict[str, Any]]:
    """The log lines of a request that `app` handles."""

    async def nothing(message: Message) -> None:
        pass

    async def front_door(request_scope: Scope, receive: Receive, send: Send) -> None:
        journal.identify(RequestContext("abc", key_name="laptop", job_in_path=job_in_path))
        await app(request_scope, receive, send)

    async def never() -> Message:
        raise NotImplementedError

    request_scope = {"type": "http", "method": "POST", "path": "/txt2img", "client": ("192.0.2.1", 1234), **scope}
    asyncio.run(RequestLog(front_door, lambda: with_prompts)(request_scope, never, nothing))
    return [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]


def responding(status: int, *outcomes: GeneratedImage | ServiceError) -> ASGIApp:
    """An application that ends one task for each outcome, the last one first, and then responds with `status`."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            for index, outcome in reversed([*enumerate(outcomes)]):
                with journal.noting(replace(TASK, seed=TASK.seed + index), index) as note:
                    if isinstance(outcome, ServiceError):
                        raise outcome
                    note(outcome)
        except ServiceError:
            pass
        await send({"type": "http.response.start", "status": status})

    return app


def test_a_line_has_the_caller_the_parameters_and_the_times(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = lines(capsys, responding(200, image(waited_s=0.5), image(waited_s=0.25)))
    assert line.pop("time").endswith("+00:00")
    assert 0 <= line.pop("time_s") < 5
    assert line == {
        "id": "abc",
        "key": "laptop",
        "client": "192.0.2.1",
        "method": "POST",
        "path": "/txt2img",
        "status": 200,
        "kind": "txt2img",
        "width": 64,
        "height": 72,
        "steps": 20,
        "seed": 7,
        "images": 2,
        "wait_s": 0.25,
        "outcome": "completed",
    }


@pytest.mark.parametrize(
    ("app", "outcome"),
    [
        (responding(200, image(), image(flagged=True)), "flagged"),
        (responding(200), "completed"),
        (responding(200, GenerationFailed("a stream of events has begun")), "failed"),
        (responding(499, Cancelled("by somebody")), "cancelled"),
        (responding(429, TooManyJobs("later")), "refused"),
        (responding(400), "refused"),
        (responding(500), "failed"),
        (responding(503), "refused"),
        (responding(503, GenerationFailed("it had begun")), "failed"),
    ],
)
def test_a_line_has_the_outcome(capsys: pytest.CaptureFixture[str], app: ASGIApp, outcome: str) -> None:
    (line,) = lines(capsys, app)
    assert line["outcome"] == outcome


def test_a_client_that_disconnects_is_logged_as_a_cancellation(capsys: pytest.CaptureFixture[str]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with journal.noting(TASK, 0):
            await send({"type": "http.response.start", "status": 200})

    (line,) = lines(capsys, app)
    assert (line["status"], line["outcome"]) == (200, "cancelled")


def test_an_asynchronous_job_has_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    async def generate() -> None:
        with journal.noting(TASK, 0) as note:
            note(image())

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        journal.note_accepted([TASK])
        generation = asyncio.create_task(journal.as_job(generate(), lambda: True))
        await send({"type": "http.response.start", "status": 202})
        await generation

    job, request = lines(capsys, app)
    assert (request["outcome"], request["status"], request["seed"], request["id"]) == ("accepted", 202, 7, "abc")
    assert (job["outcome"], job["seed"], job["id"], job["key"], job["wait_s"]) == ("completed", 7, "abc", "laptop", 0.25)
    assert not {"status", "path", "method"} & job.keys()


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        ((None, True), "flagged"),
        ((None, None), "completed"),
        ((GenerationFailed("in the stream"), None), "failed"),
        ((Cancelled("by somebody"), None), "cancelled"),
        (None, "cancelled"),
    ],
)
def test_a_request_that_follows_an_asynchronous_job_is_logged_with_the_jobs_outcome(
    capsys: pytest.CaptureFixture[str], end: tuple[ServiceError | None, bool | None] | None, outcome: str
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        journal.note_accepted([TASK])
        with journal.waiting_for_job() as note_end:
            await send({"type": "http.response.start", "status": 200})
            if end is not None:
                note_end(*end)

    (line,) = lines(capsys, app)
    assert (line["outcome"], line["status"], line["images"]) == (outcome, 200, 1)


def test_a_request_without_a_key_is_logged_whatever_its_method(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = lines(capsys, responding(401), method="GET", path="/metrics")
    assert (line["method"], line["path"], line["status"], line["outcome"]) == ("GET", "/metrics", 401, "refused")


def test_a_deletion_is_logged_with_the_id_of_the_deleted_job(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = lines(capsys, responding(200), method="DELETE", path="/jobs/def", job_in_path="def")
    assert (line["id"], line["outcome"]) == ("def", "completed")


def test_reading_requests_are_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(capsys, responding(200), method="GET") == []


def test_client_texts_cannot_break_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = lines(capsys, responding(404), with_prompts=True, path=f"/{NOISY}", client=(NOISY, 0))
    assert (line["path"], line["client"]) == (f"/{NOISY}", NOISY)


def test_prompts_are_logged_only_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = lines(capsys, responding(200, image()))
    assert "secret" not in json.dumps(line)
    (line,) = lines(capsys, responding(200, image()), with_prompts=True)
    assert (line["prompt"], line["negative_prompt"]) == ("a secret", "")


def test_a_long_path_is_truncated(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = lines(capsys, responding(404), path="/" + "x" * 60_000)
    assert len(line["path"]) == 200
