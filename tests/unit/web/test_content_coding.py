"""Compressed bodies, from gzip(1) and from unusual zlib settings: decompressed, with limits on input and output."""

from __future__ import annotations

import asyncio
import gzip
import random
import subprocess
import time
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable, Iterable

import pytest
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Message, Scope

from stable_diffusion.core.errors import InvalidRequest, QueueFull, RequestTimeout, TooLarge
from stable_diffusion.core.types import RequestContext
from stable_diffusion.web import body, content_coding, upload_budget
from stable_diffusion.web.content_coding import codings_of, decompressed, without_coding
from stable_diffusion.web.upload_budget import UNCOUNTED_BYTES, Uploads

TEXT = b'{"prompt": "a red circle", "num_inference_steps": 2}'
MIB = 2**20


def by_gzip(data: bytes, *options: str) -> bytes:
    return subprocess.run(["gzip", "--stdout", *options], input=data, capture_output=True, check=True).stdout


def bare_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(data) + compressor.flush()


def many_blocks(data: bytes) -> bytes:
    """Flush after every byte, so that each has a block of its own."""
    compressor = zlib.compressobj()
    pieces = [compressor.compress(data[i : i + 1]) + compressor.flush(zlib.Z_SYNC_FLUSH) for i in range(len(data))]
    return b"".join(pieces) + compressor.flush()


COMPRESSED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip, fast": ("gzip", lambda data: by_gzip(data, "-1")),
    "gzip, best": ("gzip", lambda data: by_gzip(data, "-9")),
    "gzip, without a name": ("gzip", lambda data: by_gzip(data, "--no-name")),
    "two gzip files": ("gzip", lambda data: by_gzip(data[:20]) + by_gzip(data[20:])),
    "an empty gzip file between": ("gzip", lambda data: by_gzip(data[:20]) + by_gzip(b"") + by_gzip(data[20:])),
    "gzip, stored": ("gzip", lambda data: gzip.compress(data, 0, mtime=0)),
    "deflate": ("deflate", zlib.compress),
    "deflate, stored": ("deflate", lambda data: zlib.compress(data, 0)),
    "bare deflate": ("deflate", bare_deflate),
    "deflate in many blocks": ("deflate", many_blocks),
}


def request(pieces: Iterable[bytes], coding: str, then: AsyncIterator[bytes] | None = None) -> Request:
    """A request as the front door passes it on: its body arrives as `pieces`, then as the messages of `then`."""
    waiting = list(pieces)

    async def receive() -> Message:
        if waiting:
            piece = waiting.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(waiting) or then is not None}
        async for piece in then or leaving():
            return {"type": "http.request", "body": piece, "more_body": True}
        return {"type": "http.disconnect"}

    headers = [(b"content-type", b"application/json"), (b"content-encoding", coding.encode()), (b"content-length", b"99999999")]
    scope: Scope = {"type": "http", "method": "POST", "path": "/txt2img", "query_string": b"", "headers": headers, "client": ("1.2.3.4", 5)}
    scope[RequestContext.KEY] = RequestContext("0")
    return Request(without_coding(scope), decompressed(receive, coding))


async def leaving() -> AsyncIterator[bytes]:
    no_pieces: list[bytes] = []
    for piece in no_pieces:
        yield piece


def in_pieces(data: bytes, size: int) -> list[bytes]:
    return [data[begin : begin + size] for begin in range(0, len(data), size)]


def read(pieces: Iterable[bytes], coding: str, max_bytes: int = MIB) -> bytes:
    return asyncio.run(body.json_content(request(pieces, coding), max_bytes))


@pytest.mark.parametrize("size", [1, 7, 2**20])
@pytest.mark.parametrize("kind", COMPRESSED)
def test_a_compressed_body_is_decompressed_exactly(kind: str, size: int) -> None:
    coding, compress = COMPRESSED[kind]
    assert read(in_pieces(compress(TEXT), size), coding) == TEXT


@pytest.mark.parametrize("kind", COMPRESSED)
def test_a_large_body_is_decompressed_completely(kind: str) -> None:
    coding, compress = COMPRESSED[kind]
    large = random.Random(1).randbytes(1000) * 150 if "many" not in kind else TEXT * 100
    assert read(in_pieces(compress(large), 2**16), coding) == large


def test_output_that_ends_at_a_piece_boundary_is_complete() -> None:
    """zlib may have consumed all input and still hold output."""
    for more in range(-3, 4):
        data = b"x" * (content_coding._PIECE_BYTES * 2 + more)
        assert read([by_gzip(data)], "gzip") == data
        assert read(in_pieces(by_gzip(data), 1), "gzip") == data


@pytest.mark.parametrize(
    ("header", "codings"),
    [
        ([], []),
        (["identity"], []),
        ([""], []),
        (["gzip"], ["gzip"]),
        (["X-GZip"], ["gzip"]),
        ([" GZIP "], ["gzip"]),
        (["deflate"], ["deflate"]),
        (["br"], ["br"]),
        (["gzip, gzip"], ["gzip", "gzip"]),
        (["gzip", "br"], ["gzip", "br"]),
        (["identity, gzip"], ["gzip"]),
    ],
)
def test_the_codings_are_read_in_the_order_of_the_header(header: list[str], codings: list[str]) -> None:
    assert codings_of(Headers(raw=[(b"content-encoding", one.encode()) for one in header])) == codings


@pytest.mark.parametrize(
    ("coding", "sent", "words"),
    [
        ("gzip", TEXT, "Content-Encoding is gzip, but the body is not valid gzip data"),
        ("gzip", zlib.compress(TEXT), "Content-Encoding is gzip, but the body is not valid gzip data"),
        ("deflate", gzip.compress(TEXT, mtime=0), "Content-Encoding is deflate, but the body is not valid deflate data"),
        ("gzip", gzip.compress(TEXT, mtime=0)[:-1], "the body is truncated"),
        ("gzip", gzip.compress(TEXT, mtime=0)[:20], "the body is truncated"),
        ("gzip", b"\x1f", "the body is truncated"),
        ("gzip", b"", "the body is truncated"),
        ("deflate", zlib.compress(TEXT)[:-1], "the body is truncated"),
        ("gzip", gzip.compress(TEXT, mtime=0) + b"GET / HTTP/1.1\r\n", "Content-Encoding is gzip, but the body is not valid gzip data"),
        ("gzip", gzip.compress(TEXT, mtime=0) + b"x", "the body is truncated"),
        ("deflate", zlib.compress(TEXT) + b"GET / HTTP/1.1\r\n", "bytes after the deflate data"),
        ("gzip", gzip.compress(TEXT, mtime=0)[:-8] + b"12345678", "incorrect data check"),
    ],
)
@pytest.mark.parametrize("size", [1, 2**20])
def test_a_body_that_does_not_match_its_coding_is_refused(coding: str, sent: bytes, words: str, size: int) -> None:
    with pytest.raises(InvalidRequest, match=words):
        read(in_pieces(sent, size) or [b""], coding)


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress, bare_deflate])
def test_a_decompression_bomb_is_refused_before_it_fills_memory(compress: Callable[[bytes], bytes]) -> None:
    bomb = compress(bytes(64 * MIB))
    coding = "gzip" if compress is gzip.compress else "deflate"
    tracemalloc.start()
    began = time.monotonic()
    try:
        with pytest.raises(TooLarge, match="the body must have at most 1048576 bytes"):
            read([bomb], coding)
        with pytest.raises(TooLarge, match="100 times the compressed size"):
            read([bomb], coding, max_bytes=1000 * MIB)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < 5
    assert peak < 10 * MIB


def test_nested_compression_is_decompressed_once() -> None:
    inner = gzip.compress(bytes(MIB))
    assert read([gzip.compress(inner, mtime=0)], "gzip") == inner


@pytest.mark.parametrize(
    "endless",
    [
        b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * MIB,  # an endless file name
        b"\x1f\x8b\x08\x00" + bytes(6) + b"\x00\x00\x00\xff\xff" * (MIB // 5),  # empty stored blocks
        gzip.compress(b"", mtime=0) * (MIB // 20),
    ],
    ids=["name", "blocks", "files"],
)
def test_input_without_output_is_refused_early(endless: bytes) -> None:
    with pytest.raises(InvalidRequest, match="larger than its content"):
        read(in_pieces(endless, 2**16), "gzip")


def test_other_requests_run_while_a_body_is_decompressed() -> None:
    turns = 0

    async def beside() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def both() -> None:
        other = asyncio.ensure_future(beside())
        data = random.Random(1).randbytes(64) * (8 * MIB // 64)
        compressed = by_gzip(data, "-1")
        with pytest.raises(TooLarge):
            await body.json_content(request([compressed], "gzip"), 8 * MIB - 1)
        other.cancel()

    asyncio.run(both())
    assert turns >= 20


def test_decompressed_bytes_count_towards_the_upload_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_budget, "MAX_BYTES_OF_CALLER", MIB)
    uploads = Uploads()
    compressed = by_gzip(bytes(MIB // 2))
    assert len(compressed) < UNCOUNTED_BYTES

    async def beside_itself() -> None:
        with body.within_upload_budget(request([compressed], "gzip"), uploads) as first:
            await body.json_content(first, MIB)
            assert uploads.held_bytes == MIB // 2 - UNCOUNTED_BYTES
            too_much = by_gzip(bytes(MIB))
            with (
                body.within_upload_budget(request([too_much], "gzip"), uploads) as second,
                pytest.raises(QueueFull, match="of this caller"),
            ):
                await body.json_content(second, 2 * MIB)

    asyncio.run(beside_itself())
    assert uploads.held_bytes == 0


def test_a_trickling_compressed_body_without_output_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "UPLOAD_PAUSE_S", 0.5)

    async def trickling() -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0.02)
            yield b"n"

    began = time.monotonic()
    with pytest.raises(RequestTimeout):
        asyncio.run(body.json_content(request([b"\x1f\x8b\x08\x08" + bytes(6)], "gzip", trickling()), MIB))
    assert time.monotonic() - began < 3


def test_a_disconnect_after_the_body_is_passed_on() -> None:
    async def after_the_body() -> str:
        there = request([by_gzip(TEXT)], "gzip")
        assert await there.body() == TEXT
        return str((await there.receive())["type"])

    assert asyncio.run(after_the_body()) == "http.disconnect"
