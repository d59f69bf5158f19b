"""An API worker takes from the queue that machines share what there is room for, and gives back what it cannot end."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stable_diffusion.core.errors import GenerationFailed, InvalidRequest, QueueFull, SharedStateUnavailable
from stable_diffusion.core.shutdown import Unfinished
from stable_diffusion.core.types import GeneratedImage, Ticket
from stable_diffusion.runner import taking
from stable_diffusion.runner.taking import take_jobs
from stable_diffusion.runner.wire import pack_outcome, pack_taken_on
from stable_diffusion.state.jobs import Taken, WaitingWork
from stable_diffusion.state.runner_status import RunnerState, StepBatchLimit
from tests.tasks import make_task
from tests.unit.runner.test_client import Lines, client_of

TICKET = Ticket("a1", "somebody", asynchronous=True, attempt=2)


@dataclass
class Queue:
    """Gives what it holds, and notes what is asked of it and given back. Fails as often as `failures` says."""

    waiting: list[Taken]
    failures: int = 0
    asked: list[int] = field(default_factory=list)
    given_back: list[tuple[Ticket, bool]] = field(default_factory=list)

    def take(self, most_images: int) -> Taken | None:
        self.asked.append(most_images)
        self._fail()
        return self.waiting.pop(0) if self.waiting else None

    def give_back(self, ticket: Ticket, *, is_redraw: bool) -> None:
        self._fail()
        self.given_back.append((ticket, is_redraw))

    def waiting_work(self) -> WaitingWork:
        return WaitingWork(len(self.waiting), 1)

    def _fail(self) -> None:
        if self.failures:
            self.failures -= 1
            raise SharedStateUnavailable("away")


@pytest.fixture(autouse=True)
def _ready_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_SHARED_FOLDER", str(tmp_path / "shared"))
    monkeypatch.setattr(taking, "_LOOK_S", 0.01)
    monkeypatch.setattr(taking, "_RETRY_S", 0.01)
    state = RunnerState(1, "fp32", "demo")
    state.enter("ready")
    state.set_batch_limit(StepBatchLimit(64, 64, 4, "measured"))


def job(images: int = 1) -> Taken:
    return Taken("a1", tuple((make_task(seed=index), replace(TICKET, index=index)) for index in range(images)))


def work_off(queue: Queue, lines: Lines, seconds: float = 0.5, *, logs_prompts: bool = False) -> list[tuple[str, str, int | None]]:
    """Take jobs for a while. Returns what was abandoned: job, type of error, attempt."""
    abandoned: list[tuple[str, str, int | None]] = []

    async def run() -> None:
        client = replace(client_of(lines), queue=queue, unfinished=Unfinished(60))
        client.jobs.abandon = lambda job_id, error, attempt=None: abandoned.append((job_id, error.type, attempt))  # type: ignore[method-assign]
        working = asyncio.create_task(take_jobs(client, lambda: logs_prompts))
        await asyncio.sleep(seconds)
        with client.unfinished.piece_of_work():
            client.unfinished.stop_when_done(lambda: None)
            await asyncio.wait_for(working, 5)

    asyncio.run(run())
    return abandoned


async def dies(_: dict[str, Any]) -> AsyncGenerator[str, None]:
    yield pack_taken_on()


async def full(_: dict[str, Any]) -> AsyncGenerator[str, None]:
    yield pack_outcome(QueueFull("200 images are waiting"))


async def refuses(_: dict[str, Any]) -> AsyncGenerator[str, None]:
    yield pack_outcome(InvalidRequest("prompt: too long"))


def test_each_image_is_handed_to_the_model_process_with_its_ticket() -> None:
    seen: list[tuple[int, int, int]] = []

    async def generates(packed: dict[str, Any]) -> AsyncGenerator[str, None]:
        seen.append((packed["task"]["seed"], packed["ticket"]["index"], packed["ticket"]["attempt"]))
        yield pack_taken_on()
        yield pack_outcome(GenerationFailed("broken"))

    queue = Queue([job(images=2)])
    abandoned = work_off(queue, generates)
    assert seen == [(0, 0, 2), (1, 1, 2)]
    assert set(abandoned) == {("a1", "generation_failed", 2)}, "unless the model process has stored the end"
    assert queue.given_back == []
    assert set(queue.asked) == {4}, "as many as share a step"


@pytest.mark.parametrize("logs_prompts", [False, True])
def test_the_line_of_a_job_that_another_machine_has_accepted_names_the_caller(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, logs_prompts: bool
) -> None:
    async def generates(_: dict[str, Any]) -> AsyncGenerator[str, None]:
        yield pack_taken_on()
        yield pack_outcome(GeneratedImage(Image.new("RGB", (8, 8)), False, "", "", waited_s=0.5))

    monkeypatch.setattr(logging.getLogger("stable_diffusion.requests"), "propagate", True)
    caplog.set_level(logging.INFO, "stable_diffusion.requests")
    ticket = replace(TICKET, key_name="laptop", client_address="192.0.2.1")
    work_off(Queue([Taken("a1", ((make_task(seed=7, prompt="a circle"), ticket),))]), generates, logs_prompts=logs_prompts)
    (line,) = [json.loads(record.message) for record in caplog.records if record.name == "stable_diffusion.requests"]
    wanted = {"id": "a1", "key": "laptop", "client": "192.0.2.1", "seed": 7, "wait_s": 0.5, "outcome": "completed"}
    assert line.items() >= wanted.items()
    assert line.get("prompt") == ("a circle" if logs_prompts else None)


def test_an_image_whose_model_process_dies_goes_to_any_machine_and_that_counts() -> None:
    queue = Queue([job()])
    assert work_off(queue, dies) == []
    assert queue.given_back == [(TICKET, True)]


def test_an_image_for_which_there_is_no_room_goes_back_and_that_does_not_count() -> None:
    queue = Queue([job()])
    assert work_off(queue, full) == []
    assert queue.given_back == [(TICKET, False)]


def test_an_image_that_the_model_process_refuses_has_ended() -> None:
    queue = Queue([job()])
    assert work_off(queue, refuses) == [("a1", "invalid_request", 2)]
    assert queue.given_back == []


def test_nothing_is_taken_while_no_model_process_is_ready() -> None:
    RunnerState(1, "fp32", "demo").enter("loading weights")
    queue = Queue([job()])
    work_off(queue, dies)
    assert queue.asked == []


def test_while_the_shared_state_is_away_the_worker_tries_again() -> None:
    queue = Queue([job()], failures=3)
    work_off(queue, dies)
    assert queue.given_back == [(TICKET, True)]


def test_a_job_that_cannot_be_read_does_not_keep_the_worker_from_the_next(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    queue = Queue([job()])
    take, unreadable = queue.take, iter([TypeError("a field of a newer version")])

    def take_after_an_unreadable_one(most_images: int) -> Taken | None:
        if (error := next(unreadable, None)) is not None:
            raise error
        return take(most_images)

    monkeypatch.setattr(queue, "take", take_after_an_unreadable_one)
    work_off(queue, dies)
    assert queue.given_back == [(TICKET, True)]
    assert "cannot be taken" in caplog.text


def test_a_worker_that_stops_takes_nothing_more() -> None:
    queue = Queue([job()])

    async def stop() -> None:
        client = replace(client_of(dies), queue=queue)
        with client.unfinished.piece_of_work():
            client.unfinished.stop_when_done(lambda: None)
            await asyncio.wait_for(take_jobs(client, lambda: False), 5)

    asyncio.run(stop())
    assert queue.asked == []


def test_a_worker_that_shares_no_queue_has_nothing_to_do() -> None:
    asyncio.run(asyncio.wait_for(take_jobs(client_of(dies), lambda: False), 5))
