"""Jobs as tests start and follow them, by asking, by their events and in the log."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx

from tests.http.asking import PROMPT
from tests.http.servers import Server

Event = tuple[str, dict[str, Any]]
NO_WAITING = {"Prefer": "respond-async"}


def start(server: Server, key: str | None = None, **fields: object) -> httpx.Response:
    headers = NO_WAITING | ({} if key is None else {"Idempotency-Key": key})
    with server.client() as client:
        response = client.post("/txt2img", json={"prompt": PROMPT, "num_inference_steps": 10, **fields}, headers=headers)
    assert response.status_code == 202, response.text
    return response


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> httpx.Response:
    # A connection of its own each time: any worker may get it.
    with server.client() as client:
        return client.request(method, path, headers=headers)


def ended(server: Server, path: str) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while (job := ask(server, path).json())["state"] in ("queued", "running"):
        assert time.monotonic() < deadline, job
        time.sleep(0.05)
    return dict(job)


def events_of(response: httpx.Response) -> Iterator[Event]:
    return ((name, data) for name, data, _ in events_with_ids_of(response))


def events_with_ids_of(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any], str]]:
    """As a browser's EventSource reads them: an event without an id has that of the one before."""
    name, data, last_id = "message", "", ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data += line.removeprefix("data: ")
        elif line.startswith("id: "):
            last_id = line.removeprefix("id: ")
        elif not line and data:
            yield name, json.loads(data), last_id
            name, data = "message", ""


def cancelled(server: Server) -> int:
    """How many jobs were cancelled, by the log."""
    return len(re.findall(r"was cancelled after", server.log))


def wait_until_idle(server: Server) -> None:
    """Until the jobs that earlier tests have left, for which nobody waits, have ended."""
    deadline = time.monotonic() + 60
    while any(waiting_and_running := _waiting_and_running(server)):
        assert time.monotonic() < deadline, f"jobs do not end: {waiting_and_running}"
        time.sleep(0.1)


def _waiting_and_running(server: Server) -> tuple[float, float]:
    page = ask(server, "/metrics").text
    waiting, running = (re.findall(rf"^stable_diffusion_{name}_jobs (\S+)$", page, re.MULTILINE) for name in ("queue", "running"))
    return float(waiting[0]), float(running[0])
