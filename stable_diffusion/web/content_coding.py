"""Undoes the Content-Encoding of request bodies, gzip and deflate, piece by piece and within bounds.

What reads the body sees the decompressed bytes only, so its own limits of size and time, and the budget of uploads, hold for those.
"""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from stable_diffusion.core.errors import InvalidRequest, TooLarge

CODINGS = ("gzip", "deflate")
# Beyond MAX_UNCHECKED_BYTES, a body that grows more than MAX_RATIO-fold is refused. Zeros grow a thousandfold, JSON some tenfold.
MAX_RATIO = 100
MAX_UNCHECKED_BYTES = 2 * 2**20
# What a client may send without anything coming out: the head of a gzip file may be of any length, and empty blocks of any number.
MAX_OVERHEAD_BYTES = 64 * 2**10
_PIECE_BYTES = 64 * 2**10
_SLICE_BYTES = 16 * 2**10  # of what is decompressed at once


def codings_of(headers: Headers) -> list[str]:
    """The codings that a request's body has, in the order in which they were applied. None of them may be one of CODINGS."""
    names = (name.strip().lower() for name in ",".join(headers.getlist("content-encoding")).split(","))
    return ["gzip" if name == "x-gzip" else name for name in names if name not in ("", "identity")]


def without_coding(scope: Scope) -> Scope:
    """The scope of the request once it is decompressed, of a length that nobody knows yet."""
    return {**scope, "headers": [one for one in scope["headers"] if one[0] not in (b"content-encoding", b"content-length")]}


def decompressed(receive: Receive, coding: str) -> Receive:
    """`receive`, with the body decompressed. `coding` is one of CODINGS.

    Reading raises InvalidRequest if the body is not of this coding, or ends early, and TooLarge if it grows beyond bounds.
    """
    inflater = _Inflater(coding)
    has_come = is_told = False  # the end of what was sent

    async def receive_decompressed() -> Message:
        nonlocal has_come, is_told
        while not is_told:
            if piece := inflater.next_piece():
                await asyncio.sleep(0)  # other requests have their turn
                return {"type": "http.request", "body": piece, "more_body": True}
            if has_come:
                inflater.require_end()
                is_told = True
                return {"type": "http.request", "body": b"", "more_body": False}
            message = await receive()
            if message["type"] != "http.request":
                return message
            inflater.add(message.get("body", b""))
            has_come = not message.get("more_body", False)
        return await receive()

    return receive_decompressed


class _Inflater:
    """Takes compressed bytes and gives decompressed ones. Holds what it was given last, and no more than one piece beside it."""

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._stream: Any = None  # zlib's decompressor; None before the first bytes and between two gzip files
        self._left = b""  # of what was added
        self._may_hold_more = False  # zlib, of what it has taken already
        self._has_ended = False
        self._taken_bytes = self._given_bytes = 0

    def add(self, data: bytes) -> None:
        self._left += data

    def next_piece(self) -> bytes:
        """At most _PIECE_BYTES; nothing if there is nothing before more is added."""
        while self._stream is not None or self._can_begin():
            if not self._left and not self._may_hold_more:
                break
            if piece := self._inflate():
                return piece
        return b""

    def require_end(self) -> None:
        if self._stream is not None or self._left or not self._has_ended:
            raise InvalidRequest(f"body: Content-Encoding says {self._coding}, and the body is cut short", field="body")

    def _can_begin(self) -> bool:
        """Begin with what comes first, or next: gzip files may follow one another (RFC 1952, 2.2)."""
        if len(self._left) < 2:
            return False
        if self._has_ended and self._coding != "gzip":
            raise InvalidRequest("body: there are bytes behind the deflate data", field="body")
        self._stream = zlib.decompressobj(_window_bits(self._coding, self._left))
        return True

    def _inflate(self) -> bytes:
        slice_, rest = self._left[:_SLICE_BYTES], self._left[_SLICE_BYTES:]
        try:
            piece: bytes = self._stream.decompress(slice_, _PIECE_BYTES)
        except zlib.error as error:
            raise InvalidRequest(f"body: Content-Encoding says {self._coding}, and the body is not that: {error}", field="body") from None
        unused: bytes = self._stream.unused_data or self._stream.unconsumed_tail
        self._left = unused + rest
        self._may_hold_more = len(piece) == _PIECE_BYTES
        self._taken_bytes += len(slice_) - len(unused)
        self._given_bytes += len(piece)
        self._require_bounds()
        if self._stream.eof:
            self._stream, self._may_hold_more, self._has_ended = None, False, True
        return piece

    def _require_bounds(self) -> None:
        if self._given_bytes > max(MAX_UNCHECKED_BYTES, MAX_RATIO * self._taken_bytes):
            raise TooLarge(
                f"the body grows more than {MAX_RATIO}-fold when it is decompressed, which is allowed up to {MAX_UNCHECKED_BYTES} bytes",
                field="body",
            )
        if self._taken_bytes > self._given_bytes + MAX_OVERHEAD_BYTES:
            raise InvalidRequest(f"body: its {self._coding} data holds next to nothing, send it without Content-Encoding", field="body")


def _window_bits(coding: str, first: bytes) -> int:
    """What zlib is to expect. "deflate" means zlib's format (RFC 9110, 8.4.1.2); some clients send the bare data, without its head."""
    if coding == "gzip":
        return zlib.MAX_WBITS | 16
    is_zlib_format = first[0] & 0x0F == 8 and int.from_bytes(first[:2], "big") % 31 == 0
    return zlib.MAX_WBITS if is_zlib_format else -zlib.MAX_WBITS
