"""The contenders without HTTP: plain diffusers, one request after the other, and this project's engine. Each has its own process.

Two models in one process would compete for its threads. A process that waits for its turn takes no processor time.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import pynvml  # type: ignore[import-untyped]

from benchmarks.clients import Round, play
from benchmarks.loads import Load, task
from benchmarks.setup import Setup
from stable_diffusion.core.errors import ServiceError
from stable_diffusion.core.types import GeneratedImage, Task

MAX_BATCH_SIZE = 10


class Contender(Protocol):
    """A system under test. `started_in_s`: from its start until it could generate."""

    name: str
    started_in_s: float

    def generate(self, load: Load) -> Round: ...
    def end(self) -> None: ...


class InProcess:
    """A process with a model that takes commands through a pipe."""

    def __init__(self, name: str, serve: Callable[[Connection, Setup], None], setup: Setup) -> None:
        self.name = name
        began = time.perf_counter()
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=serve, args=(there, setup), daemon=True)
        self._process.start()
        there.close()  # the child's end, in this process: otherwise a child that dies while it loads would go unnoticed
        self._connection.recv()  # the model is loaded
        self.started_in_s = time.perf_counter() - began

    def generate(self, load: Load) -> Round:
        result: Round = self.tell(load)
        return result

    def tell(self, order: object) -> Any:
        self._connection.send(order)
        return self._connection.recv()

    def end(self) -> None:
        self._connection.send(None)
        self._process.join()


def plain_diffusers(connection: Connection, setup: Setup) -> None:
    """The way of the original project: diffusers' own pipelines, one request after the other."""
    from benchmarks.plain import Plain

    # Load and generate on one thread: a second thread that used OpenMP would slow it down on a CPU.
    with ThreadPoolExecutor(1) as thread:
        plain = thread.submit(Plain, setup).result()
        thread.submit(plain.generate, [task(0, setup.side, 2)]).result()
        connection.send("loaded")

        async def ask(wanted: Task) -> bool:
            await asyncio.get_running_loop().run_in_executor(thread, plain.generate, [wanted])
            return True

        while (load := connection.recv()) is not None:
            connection.send(with_memory(asyncio.run(play(load, ask)), [os.getpid()]))


def engine(connection: Connection, setup: Setup) -> None:
    """This project's engine as the runner starts it, with a measured batch limit, without HTTP."""
    from stable_diffusion.core.settings import EXECUTION_VARIABLE
    from stable_diffusion.core.telemetry import StepRecord
    from stable_diffusion.models.folder import check_model
    from stable_diffusion.runner.startup import start_engine

    os.environ[EXECUTION_VARIABLE] = setup.execution
    # The batch limit is measured in this run, not recalled from an earlier one.
    os.environ["XDG_CACHE_HOME"] = str(setup.cache or tempfile.mkdtemp())
    steps: list[StepRecord] = []
    running = start_engine(check_model(setup.model), setup.precision, MAX_BATCH_SIZE, steps.append)
    connection.send("loaded")

    async def ask(wanted: Task) -> bool:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[GeneratedImage | ServiceError] = loop.create_future()

        def on_end(outcome: GeneratedImage | ServiceError) -> None:
            loop.call_soon_threadsafe(ended.set_result, outcome)

        running.submit(wanted, on_end)
        return isinstance(await ended, GeneratedImage)

    while (load := connection.recv()) is not None:
        steps.clear()
        result = asyncio.run(play(load, ask))
        rows_per_call = statistics.mean(step.rows for step in steps)
        connection.send(with_memory(replace(result, rows_per_call=rows_per_call), [os.getpid()]))
    running.close()


def with_memory(result: Round, pids: Sequence[int]) -> Round:
    """The round with the memory of these processes."""
    peaks = tuple(sorted((_peak_memory_mib(pid) for pid in pids), reverse=True))
    return replace(result, peak_memory_mib=peaks, device_memory_mib=_device_memory_mib(pids))


def _device_memory_mib(pids: Sequence[int]) -> float | None:
    """None without a GPU, or if its driver does not report memory per process."""
    try:
        pynvml.nvmlInit()
        devices = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        processes = [process for device in devices for process in pynvml.nvmlDeviceGetComputeRunningProcesses(device)]
    except pynvml.NVMLError:
        return None
    held = [process.usedGpuMemory for process in processes if process.pid in pids and process.usedGpuMemory is not None]
    return sum(held) / 2**20 if held else None


def _peak_memory_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))
