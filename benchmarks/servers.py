"""The contenders with HTTP: this project's service, and BentoML's own batching. Each is `bentoml serve` on a free loopback port."""

from __future__ import annotations

import asyncio
import io
import json
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
from PIL import Image

from benchmarks.clients import Round, play
from benchmarks.contenders import with_memory
from benchmarks.loads import Load
from benchmarks.setup import Setup
from stable_diffusion.core.types import Task
from tests.http.servers import Server, serve

REPOSITORY = Path(__file__).parents[1]


class Http:
    """A server, and the client that sends it the tasks of a load."""

    def __init__(
        self, name: str, folder: Path, environment: dict[str, str], send: Callable[[httpx.AsyncClient, Task], Awaitable[httpx.Response]]
    ) -> None:
        self.name = name
        self._send = send
        self._open = ExitStack()
        home = Path(self._open.enter_context(tempfile.TemporaryDirectory()))
        began = time.perf_counter()
        # With its own cache, so that contenders share no batch limit unless configured to.
        self._server: Server = self._open.enter_context(serve(folder, "service:svc", home, {"XDG_CACHE_HOME": str(home), **environment}))
        self.started_in_s = time.perf_counter() - began

    def generate(self, load: Load) -> Round:
        result = asyncio.run(self._play(load))
        server = psutil.Process(self._server.process.pid)
        return with_memory(result, [process.pid for process in [server, *server.children(recursive=True)]])

    async def _play(self, load: Load) -> Round:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=self._server.url, timeout=None, limits=limits) as client:

            async def ask(wanted: Task) -> bool:
                try:
                    return (await self._send(client, wanted)).is_success
                except httpx.HTTPError:
                    return False

            return await play(load, ask)

    def end(self) -> None:
        self._open.close()


def this_project(setup: Setup) -> Http:
    environment = {"SD_MODEL": str(setup.model)}
    if setup.cache is not None:
        environment["XDG_CACHE_HOME"] = str(setup.cache)
    return Http("this project, HTTP", REPOSITORY / setup.precision, environment, _send_to_this_project)


async def _send_to_this_project(client: httpx.AsyncClient, wanted: Task) -> httpx.Response:
    fields: dict[str, object] = {
        "prompt": wanted.prompt,
        "width": wanted.width,
        "height": wanted.height,
        "num_inference_steps": wanted.num_inference_steps,
        "guidance_scale": wanted.guidance_scale,
        "seed": wanted.seed,
        "scheduler": wanted.scheduler,
        "safety_check": wanted.safety_check,
    }
    if wanted.kind == "txt2img":
        return await client.post("/txt2img", json=fields)
    files = {"img": _png(wanted.image)}
    if wanted.kind == "inpaint":
        files["mask"] = _png(wanted.mask)
    return await client.post(f"/{wanted.kind}", files=files, data={"data": json.dumps(fields | {"strength": wanted.strength})})


def _png(image: Image.Image | None) -> tuple[str, bytes]:
    assert image is not None
    content = io.BytesIO()
    image.save(content, "PNG")
    return "input.png", content.getvalue()


def request_batching(setup: Setup) -> Http:
    environment = {
        "BENCH_MODEL": str(setup.model),
        "BENCH_PRECISION": setup.precision,
        "BENCH_SIDE": str(setup.side),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
        # BentoML's default timeout is 60 seconds.
        "BENTOML_CONFIG_OPTIONS": "api_server.traffic.timeout=3600 runners.traffic.timeout=3600",
    }
    return Http("BentoML's batching, HTTP", Path(__file__).parent / "request_batching", environment, _send_to_request_batching)


async def _send_to_request_batching(client: httpx.AsyncClient, wanted: Task) -> httpx.Response:
    """The service builds the task from these fields, so that no images are sent, which is to its advantage."""
    fields = {
        "number": wanted.seed,
        "side": wanted.width,
        "steps": wanted.num_inference_steps,
        "guidance_scale": wanted.guidance_scale,
        "kind": wanted.kind,
    }
    return await client.post("/generate", json=fields)
