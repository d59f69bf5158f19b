"""What several tests share: the demo model loaded once, an engine on it, and pictures to send."""

from __future__ import annotations

import os
import queue
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import hypothesis
import pytest
from hypothesis.configuration import set_hypothesis_home_dir
from PIL import Image, ImageDraw

from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.engine import Engine
from stable_diffusion.engine.job import Picture, Task
from stable_diffusion.engine.records import StepRecord
from stable_diffusion.errors import ServiceError
from stable_diffusion.pipelines import Parts, load
from stable_diffusion.weights import DEMO_FOLDER, check_model

# The same cases in every run, and nothing of them is kept in the repository.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repeatable")
set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")


class RecordingEngine:
    """The real engine on the demo model, with every UNet call recorded."""

    def __init__(self, engine: Engine, steps: list[StepRecord]) -> None:
        self.engine = engine
        self.steps = steps

    def draw(self, tasks: Sequence[Task]) -> list[Picture]:
        """Submit all tasks at once and wait for all pictures. Raises the first error."""
        outcomes: queue.SimpleQueue[tuple[int, Picture | ServiceError]] = queue.SimpleQueue()
        for position, task in enumerate(tasks):
            self.engine.submit(task, partial(_put, outcomes, position))
        pictures: dict[int, Picture] = {}
        for _ in tasks:
            position, outcome = outcomes.get(timeout=300)
            if isinstance(outcome, ServiceError):
                raise outcome
            pictures[position] = outcome
        return [pictures[position] for position in range(len(tasks))]


def _put(outcomes: queue.SimpleQueue[tuple[int, Picture | ServiceError]], position: int, outcome: Picture | ServiceError) -> None:
    outcomes.put((position, outcome))


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Servers of one run share what they keep; nothing is left of an earlier run."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def demo_parts() -> Parts:
    return load(check_model(DEMO_FOLDER), "fp32")


@pytest.fixture(scope="session")
def recording_engine(demo_parts: Parts) -> Iterator[RecordingEngine]:
    steps: list[StepRecord] = []
    engine = Engine(lambda: Denoiser(demo_parts), max_batch_size=10, on_step=steps.append)
    yield RecordingEngine(engine, steps)
    engine.close()


@pytest.fixture(scope="session")
def input_picture() -> Image.Image:
    """A yellow square in the upper left on green, 64x64."""
    picture = Image.new("RGB", (64, 64), (40, 160, 70))
    ImageDraw.Draw(picture).rectangle((8, 8, 31, 31), fill=(250, 230, 45))
    return picture


@pytest.fixture(scope="session")
def right_half_mask() -> Image.Image:
    """White, that is repainted, in the right half."""
    mask = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(mask).rectangle((32, 0, 63, 63), fill=255)
    return mask


def make_task(**changes: object) -> Task:
    """A small text-to-image task with some values changed."""
    values: dict[str, object] = {
        "kind": "txt2img",
        "prompt": "a red circle on a blue background",
        "negative_prompt": "",
        "width": 64,
        "height": 64,
        "num_inference_steps": 8,
        "guidance_scale": 7.5,
        "seed": 1,
        "scheduler": "PNDMScheduler",
        "safety_check": True,
    }
    return Task(**(values | changes))  # type: ignore[arg-type]
