"""What a model process does with a task: lines back, a note of where it stands, an end to what is cancelled or left."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from stable_diffusion.core.errors import (
    Cancelled,
    GenerationFailed,
    JobsUnavailable,
    QueueFull,
    ServiceError,
    SharedStateUnavailable,
    UnknownJob,
)
from stable_diffusion.core.telemetry import StepRecord
from stable_diffusion.core.types import GeneratedImage, Progress, Task, Ticket
from stable_diffusion.engine.admission import QueueLimits
from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.engine import Engine
from stable_diffusion.engine.loading import Parts
from stable_diffusion.runner import process
from stable_diffusion.runner.process import ModelProcess
from stable_diffusion.runner.wire import TakenOn, pack_task, unpack_update
from stable_diffusion.state.jobs import Jobs
from stable_diffusion.state.sqlite_jobs import SqliteJobs
from tests.tasks import make_task

TICKET = Ticket("a1", "somebody")
ASYNCHRONOUS = Ticket("b2", "somebody", asynchronous=True)


@pytest.fixture
def steps() -> list[StepRecord]:
    return []


@pytest.fixture
def engine(demo_parts: Parts, steps: list[StepRecord]) -> Iterator[Engine]:
    engine = Engine(lambda: Denoiser(demo_parts), 4, steps.append)
    yield engine
    engine.close()


@pytest.fixture
def jobs(tmp_path: Path) -> SqliteJobs:
    return SqliteJobs(lambda: tmp_path)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def lines(runner_jobs: ModelProcess, task: Task, ticket: Ticket = TICKET, *, follow: bool = False) -> list[str]:
    """What is said after the task was taken on."""
    taken_on, *others = [line async for line in runner_jobs.generate(pack_task(task, ticket, follow=follow))]
    assert unpack_update(taken_on) == TakenOn()
    return others


def test_drawing_yields_one_line_and_notes_the_end(engine: Engine, jobs: Jobs) -> None:
    async def draw() -> None:
        (line,) = await lines(ModelProcess(engine, jobs, 0), make_task(num_inference_steps=2))
        picture = unpack_update(line)
        assert isinstance(picture, GeneratedImage)
        assert picture.image.size == (64, 64)
        await until(lambda: jobs.get("a1")[0].state == "completed")
        assert jobs.get("a1")[0].image is None, "it went to whoever asked"

    asyncio.run(draw())


def test_who_follows_gets_a_line_for_each_step_before_the_picture(engine: Engine, jobs: Jobs) -> None:
    task = make_task(num_inference_steps=4, scheduler="DDIMScheduler")
    *progress, picture = [unpack_update(line) for line in asyncio.run(lines(ModelProcess(engine, jobs, 0), task, follow=True))]
    assert [one.step for one in progress if isinstance(one, Progress)] == [1, 2, 3, 4]
    assert isinstance(picture, GeneratedImage)


def test_a_consumer_that_leaves_stops_its_job_within_two_steps(engine: Engine, jobs: Jobs, steps: list[StepRecord]) -> None:
    left_at: list[int] = []

    async def leave_early() -> None:
        runner_jobs = ModelProcess(engine, jobs, 0)
        stream = runner_jobs.generate(pack_task(make_task(num_inference_steps=150), TICKET))
        await anext(stream)
        waiting = asyncio.ensure_future(anext(stream))
        await until(lambda: len(steps) >= 3)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        left_at.append(len(steps))
        await stream.aclose()
        # Another job in the same engine: when it is done, the abandoned one had every chance to take steps.
        await lines(runner_jobs, make_task(num_inference_steps=10), Ticket("c3", "somebody"))

    asyncio.run(leave_early())
    abandoned = steps[0].job_numbers[0]
    assert sum(abandoned in record.job_numbers for record in steps) <= left_at[0] + 2
    assert jobs.get("a1")[0].state == "cancelled"


def test_an_asynchronous_job_goes_on_when_its_consumer_leaves_and_its_picture_is_kept(engine: Engine, jobs: Jobs) -> None:
    task = make_task(num_inference_steps=20)

    async def leave_early() -> GeneratedImage:
        runner_jobs = ModelProcess(engine, jobs, 0)
        stream = runner_jobs.generate(pack_task(task, ASYNCHRONOUS))
        await anext(stream)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.2)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await stream.aclose()
        await until(lambda: jobs.get("b2")[0].is_ended)
        record = jobs.get("b2")[0]
        (line,) = await lines(runner_jobs, task)
        attended = unpack_update(line)
        assert isinstance(attended, GeneratedImage)
        assert record.finished().image == attended.image
        return attended

    asyncio.run(leave_early())


def test_a_cancelled_job_ends_within_a_second_and_its_neighbour_is_drawn(engine: Engine, jobs: Jobs, steps: list[StepRecord]) -> None:
    async def cancel_one() -> None:
        runner_jobs = ModelProcess(engine, jobs, 0)
        cancelled = asyncio.ensure_future(lines(runner_jobs, make_task(num_inference_steps=150)))
        neighbour = asyncio.ensure_future(lines(runner_jobs, make_task(num_inference_steps=20), Ticket("c3", "somebody else")))
        await until(lambda: len(steps) >= 3)
        began = time.monotonic()
        jobs.cancel("a1")
        with pytest.raises(Cancelled):
            unpack_update((await cancelled)[-1])
        assert time.monotonic() - began < 1
        assert isinstance(unpack_update((await neighbour)[-1]), GeneratedImage)

    asyncio.run(cancel_one())
    assert jobs.get("a1")[0].state == "cancelled"
    assert len(steps) < 100, "the rest of its 150 steps was not taken"


def test_a_task_that_is_not_taken_on_is_refused_in_its_first_line_and_leaves_nothing(demo_parts: Parts, jobs: Jobs) -> None:
    engine = Engine(lambda: Denoiser(demo_parts), 4, limits=QueueLimits(seconds=600, images=1))

    async def fill() -> list[str]:
        runner_jobs = ModelProcess(engine, jobs, 0)
        first = runner_jobs.generate(pack_task(make_task(num_inference_steps=150), TICKET))
        await anext(first)
        refused = [line async for line in runner_jobs.generate(pack_task(make_task(), Ticket("c3", "somebody")))]
        await first.aclose()
        return refused

    (line,) = asyncio.run(fill())
    engine.close()
    with pytest.raises(QueueFull) as refusal:
        unpack_update(line)
    assert refusal.value.retry_after_s is not None
    assert refusal.value.retry_after_s >= 1
    with pytest.raises(UnknownJob):
        jobs.get("c3")


def test_pictures_are_drawn_where_nothing_can_be_noted(engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    unwritable = SqliteJobs(lambda: tmp_path / "file")
    with caplog.at_level(logging.ERROR, logger="stable_diffusion"):
        (line,) = asyncio.run(lines(ModelProcess(engine, unwritable, 0), make_task(num_inference_steps=2)))
    assert isinstance(unpack_update(line), GeneratedImage)
    assert "The job store cannot be read or written" in caplog.text


class _Failing(SqliteJobs):
    """A store on a disk that is full: a picture cannot be written any more, a few bytes can."""

    def end(self, ticket: Ticket, outcome: GeneratedImage | ServiceError) -> None:
        if isinstance(outcome, GeneratedImage):
            raise JobsUnavailable("no space left")
        super().end(ticket, outcome)


def test_a_picture_that_cannot_be_kept_is_a_job_that_failed(engine: Engine, tmp_path: Path) -> None:
    jobs = _Failing(lambda: tmp_path)
    (line,) = asyncio.run(lines(ModelProcess(engine, jobs, 0), make_task(num_inference_steps=2), ASYNCHRONOUS))
    with pytest.raises(GenerationFailed, match="could not be stored"):
        unpack_update(line)
    assert jobs.get("b2")[0].state == "failed"


def test_a_picture_that_cannot_be_finished_is_an_error_and_nobody_waits_for_ever(
    engine: Engine, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(task: Task, outcome: GeneratedImage) -> GeneratedImage:
        raise MemoryError

    monkeypatch.setattr(process, "_with_original_outside_mask", broken)
    (line,) = asyncio.run(lines(ModelProcess(engine, jobs, 0), make_task(num_inference_steps=2)))
    with pytest.raises(GenerationFailed, match="could not be finished"):
        unpack_update(line)


class _Away(SqliteJobs):
    """A store that machines share, and that is away while `is_away` is set."""

    is_away = False
    delay_s = 0.0
    ends = 0

    def _answer(self) -> None:
        time.sleep(self.delay_s)
        if self.is_away:
            raise SharedStateUnavailable("away")

    def begin(self, ticket: Ticket, task: Task, runner: int) -> None:
        self._answer()
        super().begin(ticket, task, runner)

    def end(self, ticket: Ticket, outcome: GeneratedImage | ServiceError) -> None:
        self._answer()
        super().end(ticket, outcome)
        self.ends += 1

    def note(self, notes: Mapping[Ticket, Progress]) -> None:
        self._answer()
        super().note(notes)

    def to_cancel(self, runner: int) -> list[tuple[str, int]]:
        self._answer()
        return super().to_cancel(runner)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Away:
    monkeypatch.setattr(process, "_SHARED_STORE_RETRY_S", 0.05)
    return _Away(lambda: tmp_path)


def test_images_that_end_while_the_shared_state_is_away_are_stored_when_it_is_back(engine: Engine, shared: _Away) -> None:
    other = Ticket("c3", "somebody", asynchronous=True)

    async def draw() -> None:
        model_process = ModelProcess(engine, shared, 0)
        began = asyncio.ensure_future(lines(model_process, make_task(num_inference_steps=60), TICKET))
        kept = asyncio.ensure_future(lines(model_process, make_task(num_inference_steps=60), ASYNCHRONOUS))
        await until(lambda: {"a1", "b2"} <= {record.id for record in shared.of_owner("somebody")})
        shared.is_away = True
        begun_while_away = asyncio.ensure_future(lines(model_process, make_task(num_inference_steps=2), other))
        (line,) = await asyncio.wait_for(began, 30)
        assert isinstance(unpack_update(line), GeneratedImage), "who waits for the image gets it at once"
        await asyncio.sleep(0.3)
        assert not kept.done(), "an image that nobody waits for must not be lost"
        assert not begun_while_away.done()
        shared.is_away = False
        for waiting in (kept, begun_while_away):
            (line,) = await asyncio.wait_for(waiting, 30)
            assert isinstance(unpack_update(line), GeneratedImage)
        await until(lambda: shared.get("a1")[0].state == "completed")
        assert shared.get("b2")[0].finished().image.size == (64, 64)

    shared.accept(other, [make_task()], None, "")
    asyncio.run(draw())
    assert shared.get("c3")[0].finished().image.size == (64, 64)


def test_an_image_that_cannot_be_stored_for_long_is_a_job_that_failed(
    engine: Engine, shared: _Away, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_KEPT_FOR_STORE_S", 0.2)
    shared.is_away = True
    (line,) = asyncio.run(lines(ModelProcess(engine, shared, 0), make_task(num_inference_steps=1), ASYNCHRONOUS))
    with pytest.raises(GenerationFailed, match="could not be stored"):
        unpack_update(line)


def test_a_cancellation_is_found_when_the_shared_state_is_back(engine: Engine, shared: _Away) -> None:
    async def cancel() -> None:
        drawing = asyncio.ensure_future(lines(ModelProcess(engine, shared, 0), make_task(num_inference_steps=150)))
        await until(lambda: len(shared.of_owner("somebody")) == 1)
        shared.is_away = True
        await asyncio.sleep(0.2)
        shared.is_away = False
        shared.cancel("a1")
        with pytest.raises(Cancelled):
            unpack_update((await asyncio.wait_for(drawing, 30))[-1])

    asyncio.run(cancel())


def test_a_slow_shared_state_holds_up_neither_steps_nor_images(engine: Engine, shared: _Away, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "delay_s", 1.0)
    tickets = [Ticket(f"job {number}", "somebody") for number in range(12)]

    async def draw() -> None:
        model_process = ModelProcess(engine, shared, 0)
        drawn = await asyncio.gather(*(lines(model_process, make_task(num_inference_steps=1), ticket) for ticket in tickets))
        assert all(isinstance(unpack_update(line), GeneratedImage) for (line,) in drawn)
        assert shared.ends < 12, "no image waited until the store had taken its end"
        await until(lambda: shared.ends == 12)

    asyncio.run(draw())
    assert all(shared.get(ticket.job_id)[0].state == "completed" for ticket in tickets)


def test_progress_that_nobody_follows_is_stored_and_does_not_wake_the_event_loop(engine: Engine, jobs: Jobs) -> None:
    async def wake_ups(*, follow: bool) -> int:
        loop = asyncio.get_running_loop()
        wake, calls = loop.call_soon_threadsafe, 0

        def counting(*arguments: object, **options: object) -> asyncio.Handle:
            nonlocal calls
            calls += threading.current_thread().name == "engine"
            return wake(*arguments, **options)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "call_soon_threadsafe", counting)
            ticket = Ticket("followed" if follow else "a1", "somebody")
            model_process = ModelProcess(engine, jobs, 0)
            drawing = asyncio.ensure_future(lines(model_process, make_task(num_inference_steps=60), ticket, follow=follow))
            await until(lambda: any(0 < record.progress.step < 60 for record in jobs.of_owner("somebody")))
            await drawing
        return calls

    assert asyncio.run(wake_ups(follow=False)) == 1, "for the image"
    assert asyncio.run(wake_ups(follow=True)) > 60
