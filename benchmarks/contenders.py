"""Who draws: plain diffusers, one request after the other, and this project's engine. Each in a process of its own.

Two models in one process would share, and quarrel over, its threads. A process that waits for its turn takes no time.
"""

from __future__ import annotations

import multiprocessing
import queue
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.loads import Load
from stable_diffusion.engine.job import Task


@dataclass(frozen=True)
class Round:
    """One run of one load: how long each request took from being asked for, and what it cost."""

    seconds: float
    latencies_s: list[float]
    peak_memory_mib: float
    rows_per_call: float | None


class Contender:
    """A process that holds a model and draws loads when told to."""

    def __init__(self, name: str, draw: Callable[[Connection, Path], None], model: Path) -> None:
        self.name = name
        here, there = multiprocessing.get_context("spawn").Pipe()
        self._connection = here
        self._process = multiprocessing.get_context("spawn").Process(target=draw, args=(there, model), daemon=True)
        self._process.start()
        self._connection.recv()  # it is loaded

    def draw(self, load: Load, side: int) -> Round:
        self._connection.send((load, side))
        answer: Round = self._connection.recv()
        return answer

    def end(self) -> None:
        self._connection.send(None)
        self._process.join()


@contextmanager
def contenders(model: Path) -> Iterator[list[Contender]]:
    running: list[Contender] = []
    try:
        for name, draw in (("plain diffusers", plain_diffusers), ("engine", engine)):
            running.append(Contender(name, draw, model))
        yield running
    finally:
        for contender in running:
            contender.end()


def plain_diffusers(connection: Connection, model: Path) -> None:
    """The reference's way: diffusers' own pipeline, one request after the other; the others wait."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)

    def draw(task: Task) -> None:
        pipeline(
            prompt=task.prompt,
            negative_prompt=task.negative_prompt,
            width=task.width,
            height=task.height,
            num_inference_steps=task.num_inference_steps,
            guidance_scale=task.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(task.seed),
        )

    draw(Load("", 1, 1, (2,)).tasks(64)[0])
    connection.send("loaded")
    while (order := connection.recv()) is not None:
        load, side = order
        connection.send(_one_after_the_other(load, side, draw))


def _one_after_the_other(load: Load, side: int, draw: Callable[[Task], None]) -> Round:
    """A closed loop with a queue in front of one worker: a client's next request queues up when its last one is done."""
    began = time.perf_counter()
    tasks = iter(load.tasks(side))
    waiting = [(next(tasks), began) for _ in range(load.clients)]
    latencies: list[float] = []
    while waiting:
        task, asked = waiting.pop(0)
        draw(task)
        now = time.perf_counter()
        latencies.append(now - asked)
        if (following := next(tasks, None)) is not None:
            waiting.append((following, now))
    return Round(time.perf_counter() - began, latencies, peak_memory_mib(), None)


def engine(connection: Connection, model: Path) -> None:
    """This project's engine as the runner starts it, cap measured, without HTTP."""
    from stable_diffusion.engine.engine import StepRecord
    from stable_diffusion.runnable import start_engine
    from stable_diffusion.weights import check_model

    steps: list[StepRecord] = []
    running = start_engine(check_model(model), "fp32", max_batch_size=10, on_step=steps.append)
    connection.send("loaded")
    while (order := connection.recv()) is not None:
        load, side = order
        steps.clear()
        answer = _many_at_once(load, side, running)
        connection.send(replace(answer, rows_per_call=sum(step.rows for step in steps) / len(steps)))
    running.close()


def _many_at_once(load: Load, side: int, running: Any) -> Round:
    ended: queue.SimpleQueue[tuple[float, object]] = queue.SimpleQueue()
    began = time.perf_counter()
    tasks = iter(load.tasks(side))

    def ask(task: Task) -> None:
        asked = time.perf_counter()
        running.submit(task, lambda outcome: ended.put((asked, outcome)))

    for _ in range(load.clients):
        ask(next(tasks))
    latencies: list[float] = []
    while len(latencies) < load.requests:
        asked, outcome = ended.get()
        if isinstance(outcome, Exception):
            raise outcome
        latencies.append(time.perf_counter() - asked)
        if (following := next(tasks, None)) is not None:
            ask(following)
    return Round(time.perf_counter() - began, latencies, peak_memory_mib(), None)


def peak_memory_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
