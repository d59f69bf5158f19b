"""A browser's EventSource follows a job through connections that break: it connects again by itself, and stops after the job's end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page

from tests.http.following import ask, ended, start
from tests.http.servers import Server
from tests.redis_server import Way

FOLLOW = """(path) => {
    window.events = [];
    window.opened = 0;
    window.source = new EventSource(path);
    window.source.onopen = () => { window.opened += 1; };
    for (const name of ["queued", "progress", "preview", "completed"]) {
        window.source.addEventListener(name, (event) => window.events.push([name, event.lastEventId, JSON.parse(event.data).step ?? null]));
    }
}"""


@contextmanager
def way_to(server: Server) -> Iterator[Way]:
    way = Way(server.address[1])
    try:
        yield way
    finally:
        way.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context()
    context.set_default_timeout(60_000)
    yield context.new_page()
    context.close()


def test_it_is_told_each_step_once_and_the_end_once(server: Server, page: Page) -> None:
    location = start(server, num_inference_steps=150, width=128, height=128, preview_every_steps=10).headers["location"]
    statuses: list[int] = []
    page.on("response", lambda response: statuses.append(response.status) if response.url.endswith("/events") else None)
    with way_to(server) as way:
        page.goto(f"http://127.0.0.1:{way.port}/livez")
        page.evaluate(FOLLOW, f"{location}/events")
        for times in (1, 2):
            page.wait_for_function(f"window.events.length >= {3 * times}")
            way.cut()
            page.wait_for_function(f"window.opened > {times}")
        page.wait_for_function("window.source.readyState === EventSource.CLOSED")
        told = page.evaluate("window.events")
    assert statuses == [200, 200, 200, 204]
    assert [name for name, *_ in told].count("completed") == 1
    assert told[-1][:2] == ["completed", "ended"]
    ids = [event_id for _, event_id, _ in told]
    assert len(ids) == len(set(ids))
    steps = [step for name, _, step in told if name == "progress"]
    assert steps == sorted(set(steps))
    assert ask(server, location).json()["state"] == "completed"


def test_a_job_that_ended_while_the_connection_was_broken_is_told_all_the_same(server: Server, page: Page) -> None:
    location = start(server, num_inference_steps=60).headers["location"]
    with way_to(server) as way:
        page.goto(f"http://127.0.0.1:{way.port}/livez")
        page.evaluate(FOLLOW, f"{location}/events")
        page.wait_for_function("window.events.length >= 1")
        way.is_blocked = True
        ended(server, location)
        way.cut()
        way.is_blocked = False
        page.wait_for_function("window.source.readyState === EventSource.CLOSED")
        told = page.evaluate("window.events.map((event) => event[0])")
    assert told.count("completed") == 1
