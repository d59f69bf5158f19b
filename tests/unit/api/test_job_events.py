"""The events of a job, read by a client whose connection breaks: on each job store, and with the job taken from a machine in between."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import pytest
from PIL import Image

from stable_diffusion.api.a1111.responses import progress_response
from stable_diffusion.api.context import Context
from stable_diffusion.api.deliver import events_of
from stable_diffusion.api.event_ids import EventId, read_event_id
from stable_diffusion.api.job import description
from stable_diffusion.core.errors import Cancelled, GenerationFailed, JobsUnavailable
from stable_diffusion.core.shutdown import Unfinished
from stable_diffusion.core.types import GeneratedImage, Progress, Ticket
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from stable_diffusion.runner.client import RunnerClient
from stable_diffusion.state.job_record import JobRecord
from stable_diffusion.state.jobs import Jobs
from tests.job_stores import Store
from tests.redis_server import needs_redis_server
from tests.tasks import make_task

TICKET = Ticket("a1", "somebody", asynchronous=True)
PICTURE = GeneratedImage(Image.new("RGB", (64, 64), (200, 30, 40)), False, "", "")
RED, BLUE = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))


@dataclass(frozen=True)
class Event:
    name: str
    data: dict[str, Any]
    id: str | None

    @property
    def brief(self) -> tuple[str, int | None]:
        return self.name, self.data.get("position", self.data.get("step"))


def read(piece: bytes) -> Event | None:
    """The event of a piece of a stream; None if it has none."""
    fields = dict(re.findall(r"(?m)^(event|data|id): (.*)$", piece.decode()))
    return Event(fields["event"], json.loads(fields["data"]), fields.get("id")) if "data" in fields else None


def stream_of(jobs: Jobs, last_id: str | None = None) -> AsyncGenerator[bytes, None]:
    """As of any API worker: the client has sent `last_id`."""
    context = Context(RunnerClient(None, jobs, Unfinished(60)), lambda: check_model(DEMO_FOLDER), lambda: "off")
    return events_of(context, "a1", "png", seen=read_event_id(last_id))


async def next_of(stream: AsyncGenerator[bytes, None]) -> Event:
    while True:
        if (event := read(await asyncio.wait_for(anext(stream), 20))) is not None:
            return event


def told(jobs: Jobs, change: Callable[[], None], last_id: str | None = None, count: int = 1) -> list[Event]:
    """The first events of a stream that begins before `change` happens to the job. It is then broken."""

    async def tell() -> list[Event]:
        async with aclosing(stream_of(jobs, last_id)) as stream:
            first = asyncio.ensure_future(next_of(stream))
            await asyncio.sleep(0.3)  # some looks at the store
            assert not first.done(), first.result()
            await asyncio.to_thread(change)
            return [await first, *[await next_of(stream) for _ in range(count - 1)]]

    return asyncio.run(tell())


def shown(jobs: Jobs, last_id: str | None = None, count: int = 1) -> list[Event]:
    """The first events of a stream of the job as it stands."""

    async def tell() -> list[Event]:
        async with aclosing(stream_of(jobs, last_id)) as stream:
            return [await next_of(stream) for _ in range(count)]

    return asyncio.run(tell())


@pytest.fixture
def jobs(store: Store) -> Jobs:
    store.jobs.accept(TICKET, [make_task()], None, "print")
    if store.queue is not None:
        store.queue.take(9)
    store.jobs.begin(TICKET, make_task(), 0)
    return store.jobs


def test_a_client_that_connects_again_gets_what_it_has_not_seen_and_nothing_twice(jobs: Jobs) -> None:
    jobs.note({TICKET: Progress(3, 0, 8, 9.0)})
    (queued,) = shown(jobs)
    assert queued.brief == ("queued", 3)
    (nearer,) = told(jobs, lambda: jobs.note({TICKET: Progress(2, 0, 8, 8.0)}), queued.id)
    assert nearer.brief == ("queued", 2)
    (started,) = told(jobs, lambda: jobs.note({TICKET: Progress(0, 1, 8, 7.0)}), nearer.id)
    assert started.brief == ("progress", 1)
    jobs.note({TICKET: Progress(0, 3, 8, 5.0)})
    (step,) = shown(jobs, started.id)
    assert step.brief == ("progress", 3), "only the newest of the steps that were missed"
    (last,) = told(jobs, lambda: jobs.end(TICKET, PICTURE), step.id)
    assert (last.name, last.id) == ("completed", "ended")
    assert shown(jobs) == [last], "with the image, however late"


def test_a_preview_that_was_seen_is_not_sent_again_and_one_that_was_missed_is(jobs: Jobs) -> None:
    jobs.note({TICKET: Progress(0, 2, 8, 6.0, RED)})
    step, preview = shown(jobs, count=2)
    assert [event.brief for event in (step, preview)] == [("progress", 2), ("preview", 2)]
    (missed,) = shown(jobs, step.id)
    assert missed == preview
    (next_step,) = told(jobs, lambda: jobs.note({TICKET: Progress(0, 3, 8, 5.0)}), preview.id)
    assert next_step.brief == ("progress", 3)
    later = told(jobs, lambda: jobs.note({TICKET: Progress(0, 4, 8, 4.0, BLUE)}), next_step.id, count=2)
    assert [event.brief for event in later] == [("progress", 4), ("preview", 4)]
    assert later[1].data["image"] != preview.data["image"]


@pytest.mark.parametrize("text", ["", "7", "1.2.3", "x.y.z.", "-1.3.0.", "1.3.0.\n", "1.3.0.zzzzzzzz", f"1.{'9' * 5000}.0.", "\u0661.3.0."])
def test_what_is_no_id_counts_as_none(text: str) -> None:
    assert read_event_id(text) is None


def test_an_id_says_the_same_when_it_is_read() -> None:
    for event_id in (EventId(1, 0, 3, ""), EventId(12, 150, 0, "0badcafe")):
        assert read_event_id(str(event_id)) == event_id


@pytest.mark.parametrize("text", [None, "nonsense", "ended", "9.9.9.0badcafe"])
def test_a_client_with_no_id_or_that_of_another_job_is_told_where_the_job_stands(jobs: Jobs, text: str | None) -> None:
    jobs.note({TICKET: Progress(0, 2, 8, 6.0)})
    assert [event.brief for event in shown(jobs, text)] == [("progress", 2)]


@pytest.mark.parametrize("error", [GenerationFailed("not enough memory"), Cancelled("the job was cancelled")])
def test_the_error_of_a_job_is_its_last_event(jobs: Jobs, error: GenerationFailed | Cancelled) -> None:
    jobs.note({TICKET: Progress(0, 2, 8, 6.0)})
    (step,) = shown(jobs)
    (last,) = told(jobs, lambda: jobs.end(TICKET, error), step.id)
    assert (last.name, last.id, last.data["error"]["type"]) == ("error", "ended", error.type)


def test_an_error_of_the_store_has_no_id_so_that_its_client_goes_on_after_the_last_event(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.note({TICKET: Progress(0, 2, 8, 6.0)})
    (step,) = shown(jobs)

    def away(job_id: str, owner: str | None = None) -> list[JobRecord]:
        raise JobsUnavailable("the store is away")

    with monkeypatch.context() as patched:
        patched.setattr(jobs, "get", away)
        (error,) = shown(jobs, step.id)
    assert (error.name, error.id, error.data["error"]["type"]) == ("error", None, "jobs_unavailable")
    (next_step,) = told(jobs, lambda: jobs.note({TICKET: Progress(0, 3, 8, 5.0)}), step.id)
    assert next_step.brief == ("progress", 3)


@pytest.mark.parametrize("store", [pytest.param("redis", marks=needs_redis_server)], indirect=True)
def test_a_job_that_another_machine_generates_again_says_so_and_its_ids_still_grow(store: Store, jobs: Jobs) -> None:
    assert store.queue is not None
    jobs.note({TICKET: Progress(0, 6, 8, 2.0, RED)})
    before, preview = shown(jobs, count=2)
    assert (before.data["attempt"], description(jobs.get("a1"))["attempt"]) == (1, 1)
    store.queue.give_back(TICKET, is_redraw=True)
    job = description(jobs.get("a1"))
    assert (job["state"], job["attempt"], job["step"], job["steps"], job["seconds_left"]) == ("queued", 2, 0, 8, None)
    for_a1111 = progress_response(jobs.of_owner("somebody"))
    assert 0 < for_a1111["progress"] < 0.1, "an idle server has 0"
    assert for_a1111["state"]["job_count"] == 1
    taken = store.queue.take(9)
    assert taken is not None
    ((task, ticket),) = taken.images
    assert ticket == replace(TICKET, attempt=1, timeout_s=ticket.timeout_s)
    jobs.begin(ticket, task, 0)
    (again,) = told(jobs, lambda: jobs.note({ticket: Progress(0, 2, 8, 6.0)}), preview.id)
    assert again.brief == ("progress", 2)
    assert again.data["attempt"] == description(jobs.get("a1"))["attempt"] == 2
    (later,) = told(jobs, lambda: jobs.note({ticket: Progress(0, 6, 8, 2.0)}), again.id)
    assert later.brief == ("progress", 6), "which the first machine had reached too"
    ids = [read_event_id(event.id) for event in (before, again, later)]
    assert [(one.attempt, one.step) for one in ids if one] == [(1, 6), (2, 2), (2, 6)]


@pytest.mark.parametrize("store", [pytest.param("redis", marks=needs_redis_server)], indirect=True)
def test_whenever_the_progress_of_several_images_falls_the_attempt_has_grown(store: Store) -> None:
    assert store.queue is not None
    store.jobs.accept(TICKET, [make_task(), make_task(seed=2)], None, "print")
    seen: list[tuple[int, int]] = []

    def take_and_note(step: int) -> list[Ticket]:
        assert store.queue is not None
        taken = store.queue.take(9)
        assert taken is not None
        for task, ticket in taken.images:
            store.jobs.begin(ticket, task, 0)
            store.jobs.note({ticket: Progress(0, step, 8, 5.0)})
        return [ticket for _, ticket in taken.images]

    def look() -> None:
        job = description(store.jobs.get("a1"))
        seen.append((job["attempt"], job["step"]))

    first, second = take_and_note(4)
    look()
    store.queue.give_back(first, is_redraw=True)
    look()
    take_and_note(2)
    look()
    store.queue.give_back(second, is_redraw=False)
    look()
    take_and_note(1)
    look()
    assert seen == [(1, 8), (2, 4), (2, 6), (3, 2), (3, 3)]
