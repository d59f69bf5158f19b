"""The demo model loaded once, and an engine on it. For every folder of tests that computes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stable_diffusion.core.telemetry import StepRecord
from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.engine import Engine
from stable_diffusion.engine.loading import Parts, load
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from tests.model.recording_engine import RecordingEngine


@pytest.fixture(scope="session")
def demo_parts() -> Parts:
    return load(check_model(DEMO_FOLDER), "fp32")


@pytest.fixture(scope="session")
def recording_engine(demo_parts: Parts) -> Iterator[RecordingEngine]:
    steps: list[StepRecord] = []
    engine = Engine(lambda: Denoiser(demo_parts), max_batch_size=10, on_step=steps.append)
    yield RecordingEngine(engine, steps)
    engine.close()
