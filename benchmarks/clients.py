"""The clients of a load: they ask, wait and take the time. Knows nothing of who answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from benchmarks.loads import Load
from stable_diffusion.core.types import Task


@dataclass(frozen=True)
class Round:
    """One run of one load. `latencies_s`: from being asked for to the picture, of the requests that count."""

    seconds: float
    pictures: int
    latencies_s: list[float]
    errors: int
    rows_per_call: float | None = None
    peak_memory_mib: tuple[float, ...] = ()  # of each process of the contender, the largest first
    device_memory_mib: float | None = None  # what all of them hold of the GPU afterwards


async def play(load: Load, ask: Callable[[Task], Awaitable[bool]]) -> Round:
    """`ask` gets one picture and says whether it got it."""
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
        # From when it was due, so that a late client does not flatter anybody.
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
