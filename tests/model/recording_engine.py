"""The real engine, with every UNet call recorded."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from functools import partial

from stable_diffusion.core.errors import ServiceError
from stable_diffusion.core.telemetry import StepRecord
from stable_diffusion.core.types import GeneratedImage, Task
from stable_diffusion.engine.engine import Engine


class RecordingEngine:
    def __init__(self, engine: Engine, steps: list[StepRecord]) -> None:
        self.engine = engine
        self.steps = steps

    def draw(self, tasks: Sequence[Task]) -> list[GeneratedImage]:
        """Submit all tasks at once and wait for all pictures. Raises the first error."""
        outcomes: queue.SimpleQueue[tuple[int, GeneratedImage | ServiceError]] = queue.SimpleQueue()
        for position, task in enumerate(tasks):
            self.engine.submit(task, partial(_put, outcomes, position))
        pictures: dict[int, GeneratedImage] = {}
        for _ in tasks:
            position, outcome = outcomes.get(timeout=300)
            if isinstance(outcome, ServiceError):
                raise outcome
            pictures[position] = outcome
        return [pictures[position] for position in range(len(tasks))]


def _put(
    outcomes: queue.SimpleQueue[tuple[int, GeneratedImage | ServiceError]], position: int, outcome: GeneratedImage | ServiceError
) -> None:
    outcomes.put((position, outcome))
