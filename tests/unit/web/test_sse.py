"""Server-sent events: their format, keep-alive comments, and closing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

import pytest

from stable_diffusion.web import sse


def test_an_event_has_a_name_and_one_line_of_json() -> None:
    written = sse.event("error", {"message": "two\nlines, \u732b and half a pair \ud800"}).decode()
    name, data, *end = written.split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: ")) == {"message": "two\nlines, \u732b and half a pair ?"}
    assert end == ["", ""]


def test_an_id_follows_the_data() -> None:
    assert sse.event("progress", {"step": 1}, "1.1.0.") == b'event: progress\ndata: {"step": 1}\nid: 1.1.0.\n\n'


def test_comments_keep_the_stream_alive_and_no_event_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.02)

    async def slow() -> AsyncGenerator[bytes, None]:
        for number in range(3):
            await asyncio.sleep(0.05)
            yield b"%d" % number

    async def received() -> list[bytes]:
        return [piece async for piece in sse.kept_alive(slow())]

    pieces = asyncio.run(received())
    assert [piece for piece in pieces if not piece.startswith(b":")] == [b"0", b"1", b"2"]
    assert pieces.count(b": still here\n\n") >= 3


def test_closing_the_stream_closes_its_source() -> None:
    ended: list[str] = []

    async def endless() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"more"
                await asyncio.sleep(0.01)
        finally:
            ended.append("closed")

    async def read_one() -> None:
        pieces = sse.kept_alive(endless())
        assert await anext(pieces) == b"more"
        await pieces.aclose()

    asyncio.run(read_one())
    assert ended == ["closed"]
