"""Decompresses request bodies with Content-Encoding gzip or deflate, piece by piece and within limits.

Readers of the body see only decompressed bytes, so their limits on size and time, and the upload budget, apply to those.
"""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from stable_diffusion.core.errors import InvalidRequest, TooLarge

CODINGS = ("gzip", "deflate")
# A body that expands beyond MAX_UNCHECKED_BYTES and more than MAX_RATIO times is refused. Zeros expand a thousand times, JSON about ten.
MAX_RATIO = 100
MAX_UNCHECKED_BYTES = 2 * 2**20
# Input that may yield no output: a gzip header may have any length, and there may be any number of empty blocks.
MAX_OVERHEAD_BYTES = 64 * 2**10
_PIECE_BYTES = 64 * 2**10
_SLICE_BYTES = 16 * 2**10  # input that is decompressed at once


def codings_of(headers: Headers) -> list[str]:
    """The content codings of a request's body, in the order in which they were applied. They need not be in CODINGS."""
    names = (name.strip().lower() for name in ",".join(headers.getlist("content-encoding")).split(","))
    return ["gzip" if name == "x-gzip" else name for name in names if name not in ("", "identity")]


def without_coding(scope: Scope) -> Scope:
    """The scope of the decompressed request, whose length is unknown."""
    return {**scope, "headers": [one for one in scope["headers"] if one[0] not in (b"content-encoding", b"content-length")]}


def decompressed(receive: Receive, coding: str) -> Receive:
    """`receive`, with the body decompressed. `coding` is one of CODINGS.

    Reading raises InvalidRequest if the body does not have this coding or is truncated, and TooLarge if it expands too much.
    """
    inflater = _Inflater(coding)
    has_received_all = has_sent_end = False

    async def receive_decompressed() -> Message:
        nonlocal has_received_all, has_sent_end
        while not has_sent_end:
            if piece := inflater.next_piece():
                await asyncio.sleep(0)  # lets other requests run
                return {"type": "http.request", "body": piece, "more_body": True}
            if has_received_all:
                inflater.require_end()
                has_sent_end = True
                return {"type": "http.request", "body": b"", "more_body": False}
            message = await receive()
            if message["type"] != "http.request":
                return message
            inflater.add(message.get("body", b""))
            has_received_all = not message.get("more_body", False)
        return await receive()

    return receive_decompressed


class _Inflater:
    """Decompresses bytes piece by piece. Holds the input that was added last and at most one piece of output."""

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._stream: Any = None  # zlib's decompressor; None before the first bytes and between two gzip members
        self._pending = b""  # input
        self._may_have_output = False  # zlib may hold output of input that it has consumed
        self._has_ended = False
        self._input_bytes = self._output_bytes = 0

    def add(self, data: bytes) -> None:
        self._pending += data

    def next_piece(self) -> bytes:
        """At most _PIECE_BYTES of output; empty if more input is needed."""
        while self._stream is not None or self._begin():
            if not self._pending and not self._may_have_output:
                break
            if piece := self._inflate():
                return piece
        return b""

    def require_end(self) -> None:
        if self._stream is not None or self._pending or not self._has_ended:
            raise InvalidRequest(f"body: Content-Encoding is {self._coding}, but the body is truncated", field="body")

    def _begin(self) -> bool:
        """Begin the first or the next stream, if its head has arrived: gzip members may follow one another (RFC 1952, 2.2)."""
        if len(self._pending) < 2:
            return False
        if self._has_ended and self._coding != "gzip":
            raise InvalidRequest("body: Content-Encoding is deflate, but there are bytes after the deflate data", field="body")
        self._stream = zlib.decompressobj(_window_bits(self._coding, self._pending))
        return True

    def _inflate(self) -> bytes:
        slice_, rest = self._pending[:_SLICE_BYTES], self._pending[_SLICE_BYTES:]
        try:
            piece: bytes = self._stream.decompress(slice_, _PIECE_BYTES)
        except zlib.error as error:
            raise InvalidRequest(
                f"body: Content-Encoding is {self._coding}, but the body is not valid {self._coding} data: {error}", field="body"
            ) from None
        unused: bytes = self._stream.unused_data or self._stream.unconsumed_tail
        self._pending = unused + rest
        self._may_have_output = len(piece) == _PIECE_BYTES
        self._input_bytes += len(slice_) - len(unused)
        self._output_bytes += len(piece)
        self._require_bounds()
        if self._stream.eof:
            self._stream, self._may_have_output, self._has_ended = None, False, True
        return piece

    def _require_bounds(self) -> None:
        if self._output_bytes > max(MAX_UNCHECKED_BYTES, MAX_RATIO * self._input_bytes):
            raise TooLarge(
                f"the decompressed body must have at most {MAX_UNCHECKED_BYTES} bytes or {MAX_RATIO} times the compressed size, got more",
                field="body",
            )
        if self._input_bytes > self._output_bytes + MAX_OVERHEAD_BYTES:
            raise InvalidRequest(
                f"body: the {self._coding} data is larger than its content, send it without Content-Encoding", field="body"
            )


def _window_bits(coding: str, first: bytes) -> int:
    """The format for zlib. "deflate" means zlib's format (RFC 9110, 8.4.1.2), but some clients send raw deflate data without its header."""
    if coding == "gzip":
        return zlib.MAX_WBITS | 16
    is_zlib_format = first[0] & 0x0F == 8 and int.from_bytes(first[:2], "big") % 31 == 0
    return zlib.MAX_WBITS if is_zlib_format else -zlib.MAX_WBITS
