"""The clients of a load: they send requests, wait, and measure latencies. Does not know the contenders."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from benchmarks.loads import Load
from stable_diffusion.core.types import Task


@dataclass(frozen=True)
class Round:
    """One run of one load. `latencies_s`: from the request to the image, for the requests that count."""

    seconds: float
    images: int
    latencies_s: list[float]
    errors: int
    rows_per_call: float | None = None
    peak_memory_mib: tuple[float, ...] = ()  # of each of the contender's processes, the largest first
    device_memory_mib: float | None = None  # GPU memory of all of them afterwards


async def play(load: Load, ask: Callable[[Task], Awaitable[bool]]) -> Round:
    """Run `load` once. `ask` requests one image and returns whether it got it."""
    latencies: dict[int, float] = {}
    errors = 0
    began = time.perf_counter()

    async def one(number: int, asked: float) -> None:
        nonlocal errors
        if await ask(load.tasks[number]):
            latencies[number] = time.perf_counter() - asked
        else:
            errors += 1

    async def arrive(number: int) -> None:
        # From the time it was due, so that a late client does not shorten the latency.
        due = began + load.arrivals_s[number]
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        await one(number, due)

    async def client() -> None:
        for number in waiting:
            await one(number, time.perf_counter())

    if load.arrivals_s:
        await asyncio.gather(*(arrive(number) for number in range(len(load.tasks))))
    else:
        waiting = iter(range(len(load.tasks)))
        await asyncio.gather(*(client() for _ in range(load.clients)))
    seconds = time.perf_counter() - began
    counted = [took for number, took in latencies.items() if load.counted is None or number in load.counted]
    return Round(seconds, len(latencies), counted, errors)
