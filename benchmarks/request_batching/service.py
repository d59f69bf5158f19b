"""A service with BentoML's own adaptive batching, for comparison: whole requests share a call of diffusers' pipelines.

Requests in a batch that differ in kind, size, steps or guidance cannot share a call; the service generates them group by group.
"""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bentoml
from bentoml.legacy import Service
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from benchmarks.contenders import MAX_BATCH_SIZE
from benchmarks.loads import task
from benchmarks.setup import Setup
from stable_diffusion.core.types import Ticket
from stable_diffusion.runner.wire import pack_task, unpack_task
from stable_diffusion.state.jobs import new_job_id


class RequestBatchingRunnable(bentoml.Runnable):
    SUPPORTED_RESOURCES = ("nvidia.com/gpu", "cpu")
    SUPPORTS_CPU_MULTI_THREADING = True

    def __init__(self) -> None:
        # Imported here because API workers import this module too and must not import torch.
        from benchmarks.plain import Plain

        side = int(os.environ["BENCH_SIDE"])
        precision: Any = os.environ["BENCH_PRECISION"]
        setup = Setup(Path(os.environ["BENCH_MODEL"]), precision, side)
        # BentoML calls a method on changing threads, which makes every step slower on a CPU. The benchmark does not compare that.
        self._thread = ThreadPoolExecutor(1)
        self._plain = self._thread.submit(Plain, setup).result()
        self._thread.submit(self._plain.generate, [task(0, side, 2)]).result()

    @bentoml.Runnable.method(batchable=True)
    def generate(self, packed: list[dict[str, Any]]) -> list[bytes]:
        return self._thread.submit(self._generate, packed).result()

    def _generate(self, packed: list[dict[str, Any]]) -> list[bytes]:
        tasks = [unpack_task(one)[0] for one in packed]
        groups: dict[tuple[Any, ...], list[int]] = {}
        for position, one in enumerate(tasks):
            key = (one.kind, one.width, one.height, one.num_inference_steps, one.guidance_scale)
            groups.setdefault(key, []).append(position)
        images = [b""] * len(tasks)
        for positions in groups.values():
            for position, image in zip(positions, self._plain.generate([tasks[position] for position in positions]), strict=True):
                content = io.BytesIO()
                image.save(content, "JPEG", quality=95)
                images[position] = content.getvalue()
        return images


runner = bentoml.Runner(
    RequestBatchingRunnable,
    name="request_batching",
    max_batch_size=MAX_BATCH_SIZE,
    # BentoML refuses requests that wait longer with 503; in the benchmark every request must succeed.
    max_latency_ms=600_000,
)
svc = Service("request_batching", runners=[runner])


async def generate(request: Request) -> Response:
    fields = await request.json()
    wanted = task(fields["number"], fields["side"], fields["steps"], fields["guidance_scale"], fields["kind"])
    (image,) = await runner.generate.async_run([pack_task(wanted, Ticket(new_job_id(), owner=""))])
    return Response(image, media_type="image/jpeg")


svc.mount_asgi_app(Starlette(routes=[Route("/generate", generate, methods=["POST"])]), path="/")
