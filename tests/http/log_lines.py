"""A server's log: the lines of requests and jobs."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx

from tests.http.servers import Server


def lines_of(server: Server, text: str) -> list[dict[str, Any]]:
    """The lines that have `text` in them."""
    return [json.loads(line) for line in server.log.split("\n") if line.startswith('{"time": ') and text in line]


def line_about(server: Server, text: str, method: str | None) -> dict[str, Any]:
    """The one line of a request with `method`, or without one the line of a job's end: it may not be there yet."""
    deadline = time.monotonic() + 20
    while not (found := [line for line in lines_of(server, text) if line.get("method") == method]):
        assert time.monotonic() < deadline, server.log[-2000:]
        time.sleep(0.02)
    (line,) = found
    return line


def line_of(server: Server, answer: httpx.Response) -> dict[str, Any]:
    return line_about(server, answer.headers["job-id"], "POST")
