"""Compressed bodies, made by gzip(1) and by zlib's other settings: read, and bounded in what comes out and in what goes in."""

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
    """A flush after every byte, so that there is a block for each."""
    compressor = zlib.compressobj()
    pieces = [compressor.compress(data[i : i + 1]) + compressor.flush(zlib.Z_SYNC_FLUSH) for i in range(len(data))]
    return b"".join(pieces) + compressor.flush()


COMPRESSED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip, fast": ("gzip", lambda data: by_gzip(data, "-1")),
    "gzip, best": ("gzip", lambda data: by_gzip(data, "-9")),
    "gzip, without a name": ("gzip", lambda data: by_gzip(data, "--no-name")),
    "two gzip files": ("gzip", lambda data: by_gzip(data[:20]) + by_gzip(data[20:])),
    "an empty gzip file between": ("gzip", lambda data: by_gzip(data[:20]) + by_gzip(b"") + by_gzip(data[20:])),
    "gzip, stored": ("gzip", lambda data: gzip.compress(data, 0)),
    "deflate": ("deflate", zlib.compress),
    "deflate, stored": ("deflate", lambda data: zlib.compress(data, 0)),
    "bare deflate": ("deflate", bare_deflate),
    "deflate in many blocks": ("deflate", many_blocks),
}


def request(pieces: Iterable[bytes], coding: str, then: AsyncIterator[bytes] | None = None) -> Request:
    """As the front door passes it on: the body comes as `pieces` come, then as `then` comes."""
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
def test_a_compressed_body_is_what_was_compressed(kind: str, size: int) -> None:
    coding, compress = COMPRESSED[kind]
    assert read(in_pieces(compress(TEXT), size), coding) == TEXT


@pytest.mark.parametrize("kind", COMPRESSED)
def test_a_large_body_comes_whole(kind: str) -> None:
    coding, compress = COMPRESSED[kind]
    large = random.Random(1).randbytes(1000) * 150 if "many" not in kind else TEXT * 100
    assert read(in_pieces(compress(large), 2**16), coding) == large


def test_runs_that_end_with_a_piece_lose_nothing() -> None:
    """zlib may have taken all that was sent, and still hold some of what comes out."""
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
def test_the_header_names_the_codings_in_their_order(header: list[str], codings: list[str]) -> None:
    assert codings_of(Headers(raw=[(b"content-encoding", one.encode()) for one in header])) == codings


@pytest.mark.parametrize(
    ("coding", "sent", "told"),
    [
        ("gzip", TEXT, "Content-Encoding says gzip, and the body is not that"),
        ("gzip", zlib.compress(TEXT), "Content-Encoding says gzip, and the body is not that"),
        ("deflate", gzip.compress(TEXT, mtime=0), "Content-Encoding says deflate, and the body is not that"),
        ("gzip", gzip.compress(TEXT, mtime=0)[:-1], "the body is cut short"),
        ("gzip", gzip.compress(TEXT, mtime=0)[:20], "the body is cut short"),
        ("gzip", b"\x1f", "the body is cut short"),
        ("gzip", b"", "the body is cut short"),
        ("deflate", zlib.compress(TEXT)[:-1], "the body is cut short"),
        ("gzip", gzip.compress(TEXT, mtime=0) + b"GET / HTTP/1.1\r\n", "Content-Encoding says gzip, and the body is not that"),
        ("gzip", gzip.compress(TEXT, mtime=0) + b"x", "the body is cut short"),
        ("deflate", zlib.compress(TEXT) + b"GET / HTTP/1.1\r\n", "bytes behind the deflate data"),
        ("gzip", gzip.compress(TEXT, mtime=0)[:-8] + b"12345678", "incorrect data check"),
    ],
)
@pytest.mark.parametrize("size", [1, 2**20])
def test_what_is_not_of_its_coding_is_refused_by_name(coding: str, sent: bytes, told: str, size: int) -> None:
    with pytest.raises(InvalidRequest, match=told):
        read(in_pieces(sent, size) or [b""], coding)


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress, bare_deflate])
def test_a_bomb_is_refused_before_it_is_in_memory(compress: Callable[[bytes], bytes]) -> None:
    bomb = compress(bytes(64 * MIB))
    coding = "gzip" if compress is gzip.compress else "deflate"
    tracemalloc.start()
    began = time.monotonic()
    try:
        with pytest.raises(TooLarge, match="more than 1048576 bytes"):
            read([bomb], coding)
        with pytest.raises(TooLarge, match="grows more than 100-fold"):
            read([bomb], coding, max_bytes=1000 * MIB)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < 5
    assert peak < 10 * MIB


def test_a_bomb_in_a_bomb_is_opened_once() -> None:
    inner = gzip.compress(bytes(MIB))
    assert read([gzip.compress(inner, mtime=0)], "gzip") == inner


@pytest.mark.parametrize(
    "endless",
    [
        b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * MIB,  # a file name without an end
        b"\x1f\x8b\x08\x00" + bytes(6) + b"\x00\x00\x00\xff\xff" * (MIB // 5),  # stored blocks of nothing
        gzip.compress(b"") * (MIB // 20),
    ],
    ids=["name", "blocks", "files"],
)
def test_a_body_of_which_nothing_comes_out_is_refused_early(endless: bytes) -> None:
    with pytest.raises(InvalidRequest, match="holds next to nothing"):
        read(in_pieces(endless, 2**16), "gzip")


def test_others_have_their_turn_while_a_body_is_decompressed() -> None:
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


def test_what_comes_out_counts_towards_the_budget_of_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_budget, "MAX_BYTES_OF_CALLER", MIB)
    uploads = Uploads()
    compressed = by_gzip(bytes(MIB // 2))
    assert len(compressed) < UNCOUNTED_BYTES

    async def beside_itself() -> None:
        with body.within_upload_budget(request([compressed], "gzip"), uploads) as first:
            await body.json_content(first, MIB)
            assert uploads.held_bytes == MIB // 2 - UNCOUNTED_BYTES
            too_much = by_gzip(bytes(MIB))
            with body.within_upload_budget(request([too_much], "gzip"), uploads) as second, pytest.raises(QueueFull, match="of yours"):
                await body.json_content(second, 2 * MIB)

    asyncio.run(beside_itself())
    assert uploads.held_bytes == 0


def test_a_compressed_body_that_trickles_without_anything_coming_out_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "UPLOAD_PAUSE_S", 0.5)

    async def trickling() -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0.02)
            yield b"n"

    began = time.monotonic()
    with pytest.raises(RequestTimeout):
        asyncio.run(body.json_content(request([b"\x1f\x8b\x08\x08" + bytes(6)], "gzip", trickling()), MIB))
    assert time.monotonic() - began < 3


def test_a_client_that_leaves_is_noticed_behind_its_body() -> None:
    async def after_the_body() -> str:
        there = request([by_gzip(TEXT)], "gzip")
        assert await there.body() == TEXT
        return str((await there.receive())["type"])

    assert asyncio.run(after_the_body()) == "http.disconnect"
