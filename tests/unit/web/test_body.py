"""Bodies that stall or trickle, and clients that disconnect during an upload, with messages as from uvicorn."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message

from stable_diffusion.api.a1111 import responses as a1111_responses
from stable_diffusion.api.openai import responses as openai_responses
from stable_diffusion.api.responses import error_response, with_error_responses
from stable_diffusion.core.errors import RequestTimeout, ServiceError
from stable_diffusion.web import body

FORM = {"content-type": "multipart/form-data; boundary=x"}
FILE = b'--x\r\nContent-Disposition: form-data; name="img"; filename="a.png"\r\n\r\n'


def request(pieces: AsyncIterator[bytes], headers: dict[str, str] | None = None) -> Request:
    """A request whose body arrives as `pieces`, and then stalls."""

    async def receive() -> Message:
        async for piece in pieces:
            return {"type": "http.request", "body": piece, "more_body": True}
        return {"type": "http.disconnect"}

    encoded = [(name.encode(), value.encode()) for name, value in (headers or {"content-type": "application/json"}).items()]
    return Request({"type": "http", "method": "POST", "path": "/txt2img", "query_string": b"", "headers": encoded}, receive)


async def trickling(pause_s: float, piece: bytes = b"x") -> AsyncIterator[bytes]:
    while True:
        await asyncio.sleep(pause_s)
        yield piece


async def stalling(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
    await asyncio.sleep(60)


async def leaving(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


@pytest.fixture(autouse=True)
def _short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "UPLOAD_PAUSE_S", 0.3)
    monkeypatch.setattr(body, "UPLOAD_GRACE_S", 1.0)
    monkeypatch.setattr(body, "UPLOAD_TIMEOUT_S", 2.0)


async def seconds_to_refuse(slow: Request) -> float:
    began = time.monotonic()
    with pytest.raises(RequestTimeout, match="the body arrived too slowly"):
        await body.json_content(slow, 2**20)
    return time.monotonic() - began


def test_a_body_that_stalls_is_refused_after_the_longest_allowed_pause() -> None:
    assert 0.3 <= asyncio.run(seconds_to_refuse(request(stalling(b'{"prompt": ')))) < 1.0


def test_a_body_that_trickles_is_refused_after_the_grace_period() -> None:
    assert 1.0 <= asyncio.run(seconds_to_refuse(request(trickling(0.05)))) < 2.0


def test_a_body_at_the_allowed_speed_is_refused_after_the_total_time_limit() -> None:
    assert 2.0 <= asyncio.run(seconds_to_refuse(request(trickling(0.05, b"x" * 2000)))) < 3.0


def test_every_dialect_responds_to_a_slow_body_with_408_and_closes() -> None:
    async def endpoint(slow: Request) -> Response:
        return Response(await body.json_content(slow, 2**20))

    dialects: dict[bytes, Callable[[ServiceError], Response]] = {
        b'"type":"request_timeout"': error_response,
        b'"code":"request_timeout"': openai_responses.error_response,
        b'"error": "RequestTimeout"': a1111_responses.error_response,
    }

    async def response_of_dialect(form: Callable[[ServiceError], Response]) -> Response:
        return await with_error_responses(endpoint, form)(request(stalling(b"{")))

    for words, form in dialects.items():
        response = asyncio.run(response_of_dialect(form))
        assert (response.status_code, response.headers["connection"]) == (408, "close")
        assert words in response.body


def test_an_aborted_upload_leaves_no_file_open() -> None:
    """Starlette stores a part of more than a megabyte in a temporary file."""
    big = FILE + b"x" * 3 * 2**20

    async def abandon(pieces: AsyncIterator[bytes], error: type[Exception]) -> Any:
        with pytest.raises(error):
            async with body.opened_form(request(pieces, FORM), max_images=1, max_parts=4):
                raise AssertionError("the form must not be complete")

    before = len(os.listdir("/proc/self/fd"))
    gc.disable()  # closing must not depend on it
    try:
        asyncio.run(abandon(stalling(big), RequestTimeout))
        asyncio.run(abandon(leaving(big), ClientDisconnect))
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()
