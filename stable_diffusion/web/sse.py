"""Writes server-sent events (HTML standard, section 9.2) and keeps their stream alive. Does not know the events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

MEDIA_TYPE = "text/event-stream"
# Load balancers and proxies close connections without traffic, most of them after 60 seconds by default.
KEEP_ALIVE_S = 15.0
_COMMENT = b": still here\n\n"
# How long a browser waits before it connects again; the HTML standard leaves it to the browser, which takes three to five seconds.
RETRY = b"retry: 1000\n\n"
LAST_ID_HEADER = "Last-Event-ID"
# Without these, nginx buffers a stream.
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def event(name: str, data: Mapping[str, Any], event_id: str | None = None) -> bytes:
    """One event with its data as JSON on a single line.

    The id comes last: a client that notes it at once, and not at the event's end as the standard says, then has the data too.
    """
    id_line = "" if event_id is None else f"id: {event_id}\n"
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n{id_line}\n".encode("utf-8", "replace")


async def kept_alive(pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Yield `pieces`, and a comment after every KEEP_ALIVE_S without one. Closing this generator closes `pieces`."""
    waiting = asyncio.ensure_future(anext(pieces))
    try:
        while True:
            done, _ = await asyncio.wait({waiting}, timeout=KEEP_ALIVE_S)
            if not done:
                yield _COMMENT
                continue
            try:
                piece = waiting.result()
            except StopAsyncIteration:
                return
            yield piece
            waiting = asyncio.ensure_future(anext(pieces))
    finally:
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await pieces.aclose()
