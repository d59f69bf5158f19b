"""In every API, uploads have a memory budget, and no upload stays in memory while its image is generated."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from starlette.applications import Starlette
from starlette.types import Message, Scope

from stable_diffusion.api import a1111, deliver, native, openai, reproduce
from stable_diffusion.api.a1111 import routes as a1111_routes
from stable_diffusion.api.context import Context
from stable_diffusion.core.errors import GenerationFailed, QueueFull
from stable_diffusion.core.shutdown import Unfinished
from stable_diffusion.core.types import GeneratedImage, RequestContext
from stable_diffusion.images import infotext
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from stable_diffusion.runner.client import RunnerClient
from stable_diffusion.state.jobs import new_job_id
from stable_diffusion.state.sqlite_jobs import SqliteJobs
from stable_diffusion.web import upload_budget
from stable_diffusion.web.upload_budget import UNCOUNTED_BYTES, Uploads
from tests.tasks import make_task

MIB = 2**20
MODEL = check_model(DEMO_FOLDER, name="demo")
PIECE_BYTES = 2**16


@pytest.fixture
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_budget, "MAX_BYTES", 4 * MIB)
    monkeypatch.setattr(upload_budget, "MAX_BYTES_OF_CALLER", 3 * MIB)


def make_context() -> Context:
    return Context(RunnerClient(None, SqliteJobs(Path), Unfinished(grace_s=60)), lambda: MODEL, lambda: "default-on")


def noise() -> bytes:
    """A PNG of 3 MiB with the parameters that it was generated with."""
    pixels = random.Random(1).randbytes(1024 * 1024 * 3)
    image = GeneratedImage(Image.new("RGB", (64, 64)), None, "", "", device="cpu", dtype="float32")
    info = PngInfo()
    info.add_text("parameters", infotext.write(make_task(), image, MODEL))
    file = io.BytesIO()
    Image.frombytes("RGB", (1024, 1024), pixels).save(file, "png", pnginfo=info)
    return file.getvalue()


NOISE = noise()
WISHES = json.dumps({"prompt": "x", "num_inference_steps": 2, "width": 64, "height": 64})
DOORS: dict[str, dict[str, Any]] = {
    "/img2img": {"files": {"img": NOISE}, "data": {"data": WISHES}},
    "/inpaint": {"files": {"img": NOISE, "mask": NOISE}, "data": {"data": WISHES}},
    "/reproduce": {"files": {"picture": NOISE}},
    "/v1/images/edits": {"files": {"image": NOISE}, "data": {"prompt": "x", "size": "64x64"}},
    "/sdapi/v1/img2img": {
        "json": {"init_images": [base64.b64encode(NOISE).decode()], "prompt": "x", "steps": 2, "width": 64, "height": 64}
    },
}


class Apis:
    """All APIs with a context that generates nothing, called without a server."""

    def __init__(self) -> None:
        self.context = make_context()
        apis = (native, reproduce, openai, a1111)
        self._app = Starlette(routes=[route for api in apis for route in api.make_routes(self.context)])

    async def send(self, path: str, body: bytes, headers: dict[str, str], *, ends: bool = True) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the response. The request body arrives in pieces, as from uvicorn, and may never end."""
        pieces = self._pieces(body, ends)
        sent: list[Message] = []

        async def receive() -> Message:
            async for message in pieces:
                return message
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Message) -> None:
            sent.append(message)

        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        scope: Scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": encoded, "client": ("192.0.2.1", 1)}
        scope[RequestContext.KEY] = RequestContext(new_job_id())
        await self._app(scope, receive, send)
        headers_received = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], headers_received, b"".join(message.get("body", b"") for message in sent)

    async def _pieces(self, body: bytes, ends: bool) -> AsyncIterator[Message]:
        for begin in range(0, len(body), PIECE_BYTES):
            yield {"type": "http.request", "body": body[begin : begin + PIECE_BYTES], "more_body": True}
            await asyncio.sleep(0)
        if ends:
            yield {"type": "http.request", "body": b"", "more_body": False}


@pytest.mark.parametrize("path", DOORS)
def test_an_upload_is_released_before_its_image_is_generated(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    apis, kept = Apis(), []

    async def generate(*_: object) -> NoReturn:
        await asyncio.sleep(0.1)  # the decoding thread releases the upload a moment later
        kept.append(tracemalloc.get_traced_memory()[0])
        assert apis.context.uploads.held_bytes == 0
        raise GenerationFailed("that was all")

    for name in ("generate", "generate_all"):
        monkeypatch.setattr(deliver, name, generate)
    request = httpx.Request("POST", f"http://x{path}", **DOORS[path])
    body = request.read()
    asyncio.run(apis.send(path, body, dict(request.headers)))  # warm up: what the first request loads stays in memory
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        status, _, response = asyncio.run(apis.send(path, body, dict(request.headers)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert status == 500, response
    assert peak - before > len(NOISE), "it was uploads"
    assert kept[1] - before < MIB


@pytest.mark.usefixtures("small_bounds")
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/inpaint", b'"type":"queue_full"'),
        ("/reproduce", b'"type":"queue_full"'),
        ("/v1/images/edits", b'"code":"queue_full"'),
        ("/sdapi/v1/img2img", b'"error": "QueueFull"'),
    ],
)
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
def test_an_upload_over_the_budget_is_refused_in_the_apis_error_form(path: str, words: bytes, declared: bool) -> None:
    request = httpx.Request("POST", f"http://x{path}", **DOORS[path])
    headers = dict(request.headers)
    if not declared:
        del headers["content-length"]

    async def beside_others() -> tuple[int, dict[str, str], bytes]:
        apis = Apis()
        with apis.context.uploads.of("somebody else", 0) as count:
            count(2 * MIB)
            response = await apis.send(path, request.read(), headers, ends=False)
            assert 0 < apis.context.uploads.held_bytes <= 2 * MIB, "a refused upload is not counted"
            return response

    status, headers_received, body = asyncio.run(beside_others())
    assert (status, headers_received["retry-after"]) == (429, "5")
    assert words in body


@pytest.mark.usefixtures("small_bounds")
def test_a_request_without_images_is_read_even_if_the_budget_is_exhausted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def generate(*_: object) -> NoReturn:
        raise GenerationFailed("that was all")

    monkeypatch.setattr(deliver, "generate", generate)

    async def beside_others() -> int:
        apis = Apis()
        with apis.context.uploads.of("somebody", 0) as one, apis.context.uploads.of("somebody else", 0) as another:
            one(3 * MIB), another(MIB + 2 * UNCOUNTED_BYTES)
            status, _, _ = await apis.send("/txt2img", WISHES.encode(), {"content-type": "application/json"})
            return status

    assert asyncio.run(beside_others()) == 500


@pytest.mark.usefixtures("small_bounds")
def test_one_caller_leaves_room_for_others() -> None:
    uploads = Uploads()
    with uploads.of("alice", 0) as count:
        count(2 * MIB)
        with uploads.of("alice", 2 * MIB) as more, pytest.raises(QueueFull, match="uploads of this caller"):
            more(1)
        with uploads.of("bob", 2 * MIB) as other:
            other(2 * MIB)
            with uploads.of("carol", 0) as third, pytest.raises(QueueFull, match="of all callers"):
                third(MIB)
    assert uploads.held_bytes == 0


def test_a_caller_may_upload_two_of_the_largest_bodies() -> None:
    assert 2 * a1111_routes._MAX_IMAGES_BYTES <= upload_budget.MAX_BYTES_OF_CALLER


def test_a_body_over_the_size_limit_gets_413_rather_than_429() -> None:
    apis = Apis()
    headers = {"content-type": "application/json", "content-length": str(2**30)}
    assert asyncio.run(apis.send("/sdapi/v1/img2img", b"{", headers))[0] == 413
