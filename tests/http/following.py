"""Jobs as tests start and follow them."""

from __future__ import annotations

import time
from typing import Any

import httpx

from tests.http.asking import PROMPT
from tests.http.servers import Server

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
