"""A service as BentoML's own adaptive batching makes it, to compare with: whole requests share a call of diffusers' pipelines.

Requests of a batch that differ in kind, size, steps or guidance cannot share a call and are drawn group by group.
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
        # Imported here because API workers import this module too and must stay without torch.
        from benchmarks.plain import Plain

        side = int(os.environ["BENCH_SIDE"])
        precision: Any = os.environ["BENCH_PRECISION"]
        setup = Setup(Path(os.environ["BENCH_MODEL"]), precision, side)
        # BentoML calls a method on one of several threads, which on a CPU makes every step slower. That is not what is compared here.
        self._thread = ThreadPoolExecutor(1)
        self._plain = self._thread.submit(Plain, setup).result()
        self._thread.submit(self._plain.draw, [task(0, side, 2)]).result()

    @bentoml.Runnable.method(batchable=True)
    def draw(self, packed: list[dict[str, Any]]) -> list[bytes]:
        return self._thread.submit(self._draw, packed).result()

    def _draw(self, packed: list[dict[str, Any]]) -> list[bytes]:
        tasks = [unpack_task(one)[0] for one in packed]
        groups: dict[tuple[Any, ...], list[int]] = {}
        for position, one in enumerate(tasks):
            key = (one.kind, one.width, one.height, one.num_inference_steps, one.guidance_scale)
            groups.setdefault(key, []).append(position)
        answers = [b""] * len(tasks)
        for positions in groups.values():
            for position, image in zip(positions, self._plain.draw([tasks[position] for position in positions]), strict=True):
                content = io.BytesIO()
                image.save(content, "JPEG", quality=95)
                answers[position] = content.getvalue()
        return answers


runner = bentoml.Runner(
    RequestBatchingRunnable,
    name="request_batching",
    max_batch_size=MAX_BATCH_SIZE,
    # What waits longer is shed with 503; every request of the benchmark is to be answered.
    max_latency_ms=600_000,
)
svc = Service("request_batching", runners=[runner])


async def draw(request: Request) -> Response:
    fields = await request.json()
    wanted = task(fields["number"], fields["side"], fields["steps"], fields["guidance_scale"], fields["kind"])
    (picture,) = await runner.draw.async_run([pack_task(wanted, Ticket(new_job_id(), owner=""))])
    return Response(picture, media_type="image/jpeg")


svc.mount_asgi_app(Starlette(routes=[Route("/draw", draw, methods=["POST"])]), path="/")
