"""The client of the model process: refused tasks, timeouts, cancellation, and the shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stable_diffusion.core.errors import (
    GenerationFailed,
    JobsUnavailable,
    ModelLoading,
    ModelUnavailable,
    QueueFull,
    ServiceError,
    ShuttingDown,
)
from stable_diffusion.core.shutdown import Unfinished
from stable_diffusion.core.types import Task, Ticket
from stable_diffusion.runner import client as client_module
from stable_diffusion.runner.client import RunnerClient, begin, follow, generate, generate_asynchronously
from stable_diffusion.runner.wire import pack_outcome, pack_taken_on
from stable_diffusion.state.folder import shared_folder
from stable_diffusion.state.job_record import JobRecord
from stable_diffusion.state.runner_status import RunnerState
from stable_diffusion.state.sqlite_jobs import SqliteJobs
from tests.tasks import make_task

TICKET = Ticket("a1", "somebody")
Lines = Callable[[dict[str, Any]], AsyncGenerator[str, None]]


@pytest.fixture(autouse=True)
def _ready_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_SHARED_FOLDER", str(tmp_path / "shared"))
    RunnerState(1, "fp32", "demo").enter("ready")


def client_of(lines: Lines, grace_s: float = 60) -> RunnerClient:
    runner = SimpleNamespace(txt2img=SimpleNamespace(async_stream=lines))
    return RunnerClient(runner, SqliteJobs(shared_folder), Unfinished(grace_s))


async def never_responds(_: dict[str, Any]) -> AsyncGenerator[str, None]:
    await asyncio.sleep(60)
    yield ""


async def generates_for_ever(_: dict[str, Any]) -> AsyncGenerator[str, None]:
    yield pack_taken_on()
    await asyncio.sleep(60)


async def at_once(call: Callable[..., Any], *arguments: Any) -> Any:
    return call(*arguments)


async def dies(_: dict[str, Any]) -> AsyncGenerator[str, None]:
    yield pack_taken_on()


async def end_of(client: RunnerClient, job_id: str) -> list[JobRecord]:
    last: list[JobRecord] = []
    async with aclosing(follow(client, job_id)) as standings:
        async for records in standings:
            last = records
    return last


async def full(_: dict[str, Any]) -> AsyncGenerator[str, None]:
    yield pack_outcome(QueueFull("200 images are waiting", retry_after_s=7))


def error_of(client: RunnerClient, task: Task, *, stopping: bool = False) -> ServiceError:
    async def to_its_end() -> None:
        if stopping:
            client.unfinished.stop_when_done(lambda: None)
        async for _ in await begin(client, task, TICKET, follow=False):
            pass

    with pytest.raises(ServiceError) as caught:
        asyncio.run(to_its_end())
    return caught.value


def test_no_task_is_sent_once_the_shutdown_has_begun() -> None:
    assert isinstance(error_of(client_of(never_responds), make_task(), stopping=True), ShuttingDown)


def test_a_task_that_is_not_accepted_in_time_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_ACCEPTANCE_TIMEOUT_S", 0.1)
    error = error_of(client_of(never_responds), make_task())
    assert isinstance(error, ModelUnavailable)
    assert error.message.startswith("the model process does not respond")


def test_while_the_model_loads_the_error_names_the_stage() -> None:
    RunnerState(1, "fp32", "demo").enter("loading weights")
    error = error_of(client_of(never_responds), make_task())
    assert isinstance(error, ModelLoading)
    assert error.message == "the model process is not ready: loading weights"


def test_a_generation_fails_when_the_grace_period_is_over() -> None:
    async def stop_and_wait() -> None:
        client = client_of(generates_for_ever, grace_s=0.1)
        with client.unfinished.piece_of_work():
            updates = await begin(client, make_task(), TICKET, follow=False)
            client.unfinished.stop_when_done(lambda: None)
            async for _ in updates:
                pass

    with pytest.raises(ShuttingDown):
        asyncio.run(asyncio.wait_for(stop_and_wait(), 5))


@pytest.mark.parametrize("moment", range(8))
def test_a_client_that_disconnects_around_the_acceptance_cancels_its_task(moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    monkeypatch.setattr(client_module, "run_in_threadpool", at_once)  # so that every await is counted

    async def leave() -> None:
        may_be_taken_on = asyncio.Event()

        async def lines(_: dict[str, Any]) -> AsyncGenerator[str, None]:
            try:
                await may_be_taken_on.wait()
                yield pack_taken_on()
                await asyncio.sleep(60)
            finally:
                closed.append("closed")

        generation = asyncio.ensure_future(generate(client_of(lines), make_task(), TICKET))
        await asyncio.sleep(0.1)
        may_be_taken_on.set()
        for _ in range(moment):
            await asyncio.sleep(0)
        generation.cancel()
        await asyncio.wait({generation}, timeout=5)
        assert generation.cancelled()

    asyncio.run(leave())
    assert closed == ["closed"]


def test_a_job_is_ended_even_if_the_store_fails_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_ABANDON_RETRY_S", 0.05)
    failures = iter(range(3))

    async def hold() -> ServiceError | None:
        client = client_of(dies)
        abandon = client.jobs.abandon

        def full_disk(job_id: str, error: ServiceError) -> None:
            if next(failures, None) is not None:
                raise JobsUnavailable("where jobs stand cannot be read or written")
            abandon(job_id, error)

        monkeypatch.setattr(client.jobs, "abandon", full_disk)
        ticket = Ticket("c3", "somebody", asynchronous=True)
        client.jobs.accept(ticket, [make_task()], None, "what")
        await generate_asynchronously(client, [make_task()], ticket)
        [record] = await end_of(client, "c3")
        assert client.followers == set()
        return record.error

    assert isinstance(asyncio.run(asyncio.wait_for(hold(), 20)), ModelUnavailable)
    assert next(failures, None) is None


def test_many_followers_poll_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []

    async def follow_with(many: int) -> int:
        client = client_of(full)
        client.jobs.accept(Ticket("d4", "somebody", asynchronous=True), [make_task()], None, "what")
        get = client.jobs.get

        def look(job_id: str) -> list[JobRecord]:
            looks.append(job_id)
            return get(job_id)

        monkeypatch.setattr(client.jobs, "get", look)
        client.followers.update(object() for _ in range(many))
        looks.clear()
        following = asyncio.ensure_future(end_of(client, "d4"))
        await asyncio.sleep(1)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        client.jobs.abandon("d4", GenerationFailed("failed"))
        return len(looks)

    assert asyncio.run(follow_with(0)) >= 4
    assert asyncio.run(follow_with(50)) <= 3


def test_a_refused_asynchronous_job_fails_at_once_with_a_retry_time() -> None:
    async def ask() -> RunnerClient:
        client = client_of(full)
        ticket = Ticket("b2", "somebody", asynchronous=True)
        client.jobs.accept(ticket, [make_task()], None, "what")
        with pytest.raises(QueueFull):
            await generate_asynchronously(client, [make_task()], ticket)
        while not client.jobs.get("b2")[0].is_ended:
            await asyncio.sleep(0.01)
        return client

    error = asyncio.run(ask()).jobs.get("b2")[0].error
    assert isinstance(error, QueueFull)
    assert error.retry_after_s == 7
