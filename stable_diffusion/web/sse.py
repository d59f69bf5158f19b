"""Server-sent events as the HTML standard has them (section 9.2): how an answer in pieces is written.

Knows nothing of what the events say.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

MEDIA_TYPE = "text/event-stream"
# Balancers and proxies close a connection on which nothing was sent for a while: 60 seconds by default in most.
KEEP_ALIVE_S = 15.0
_COMMENT = b": still here\n\n"
# nginx holds a stream back otherwise.
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def event(name: str, data: Mapping[str, Any]) -> bytes:
    """One event, its data as JSON on a single line."""
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode("utf-8", "replace")


async def kept_alive(pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The same pieces, with a comment wherever nothing came for a while. Closing it closes `pieces`."""
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
