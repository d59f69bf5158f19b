"""What a request's line says, of requests that are made up; `tests/service/test_request_log.py` has a real server's."""

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
    """The log is written to the standard output of the test."""
    logger = logging.getLogger("stable_diffusion.requests")
    before = logger.handlers, logger.propagate
    yield
    logger.handlers, logger.propagate = before


def picture(flagged: bool | None = False, waited_s: float = 0.25) -> GeneratedImage:
    return GeneratedImage(Image.new("RGB", (8, 8)), flagged, "", "", waited_s=waited_s)


def lines(
    capsys: pytest.CaptureFixture[str], app: ASGIApp, job_in_path: str | None = None, with_prompts: bool = False, **scope: Any
) -> list[dict[str, Any]]:
    """What is logged of a request that `app` answers."""

    async def nothing(message: Message) -> None:
        pass

    async def front_door(asked: Scope, receive: Receive, send: Send) -> None:
        journal.identify(RequestContext("abc", key_name="laptop", job_in_path=job_in_path))
        await app(asked, receive, send)

    async def never() -> Message:
        raise NotImplementedError

    asked = {"type": "http", "method": "POST", "path": "/txt2img", "client": ("192.0.2.1", 1234), **scope}
    asyncio.run(RequestLog(front_door, lambda: with_prompts)(asked, never, nothing))
    return [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]


def answering(status: int, *outcomes: GeneratedImage | ServiceError) -> ASGIApp:
    """Draws a task for each outcome, the last one first, and answers when all are there."""

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


def test_a_line_says_who_asked_for_what_and_how_long_it_took(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = lines(capsys, answering(200, picture(waited_s=0.5), picture(waited_s=0.25)))
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
        (answering(200, picture(), picture(flagged=True)), "flagged"),
        (answering(200), "completed"),
        (answering(200, GenerationFailed("a stream of events has begun")), "failed"),
        (answering(499, Cancelled("by somebody")), "cancelled"),
        (answering(429, TooManyJobs("later")), "refused"),
        (answering(400), "refused"),
        (answering(500), "failed"),
        (answering(503), "refused"),
        (answering(503, GenerationFailed("it had begun")), "failed"),
    ],
)
def test_a_line_says_how_it_ended(capsys: pytest.CaptureFixture[str], app: ASGIApp, outcome: str) -> None:
    (line,) = lines(capsys, app)
    assert line["outcome"] == outcome


def test_a_client_that_leaves_is_a_cancellation(capsys: pytest.CaptureFixture[str]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with journal.noting(TASK, 0):
            await send({"type": "http.response.start", "status": 200})

    (line,) = lines(capsys, app)
    assert (line["status"], line["outcome"]) == (200, "cancelled")


def test_a_job_that_nobody_waits_for_has_a_second_line(capsys: pytest.CaptureFixture[str]) -> None:
    async def draw() -> None:
        with journal.noting(TASK, 0) as note:
            note(picture())

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        journal.note_accepted([TASK])
        drawing = asyncio.create_task(journal.as_job(draw(), lambda: True))
        await send({"type": "http.response.start", "status": 202})
        await drawing

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
def test_who_waits_for_a_job_that_goes_on_without_him_has_its_outcome(
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


def test_a_request_without_a_key_has_a_line_whatever_its_method(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = lines(capsys, answering(401), method="GET", path="/metrics")
    assert (line["method"], line["path"], line["status"], line["outcome"]) == ("GET", "/metrics", 401, "refused")


def test_a_deletion_names_the_job_that_is_deleted(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = lines(capsys, answering(200), method="DELETE", path="/jobs/def", job_in_path="def")
    assert (line["id"], line["outcome"]) == ("def", "completed")


def test_requests_that_only_read_have_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(capsys, answering(200), method="GET") == []


def test_nothing_that_a_client_sends_breaks_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = lines(capsys, answering(404), with_prompts=True, path=f"/{NOISY}", client=(NOISY, 0))
    assert (line["path"], line["client"]) == (f"/{NOISY}", NOISY)


def test_prompts_are_logged_only_where_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = lines(capsys, answering(200, picture()))
    assert "secret" not in json.dumps(line)
    (line,) = lines(capsys, answering(200, picture()), with_prompts=True)
    assert (line["prompt"], line["negative_prompt"]) == ("a secret", "")


def test_a_long_path_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = lines(capsys, answering(404), path="/" + "x" * 60_000)
    assert len(line["path"]) == 200
