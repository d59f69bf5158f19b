"""A task and its outcome cross the process hop unchanged; a consumer that leaves cancels its job."""

from __future__ import annotations

import asyncio
import logging
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.engine import Engine, StepRecord
from stable_diffusion.engine.job import Picture, Progress
from stable_diffusion.errors import GenerationFailed
from stable_diffusion.pipelines import Parts
from stable_diffusion.runnable import draw, pack_outcome, pack_task, start_engine, unpack_news, unpack_task
from stable_diffusion.weights import DEMO_FOLDER, check_model
from tests.conftest import RecordingEngine, make_task


def test_a_task_with_pictures_arrives_as_it_was_sent(input_picture: Image.Image, right_half_mask: Image.Image) -> None:
    task = make_task(kind="inpaint", image=input_picture, mask=right_half_mask, prompt="\u732b \U0001f600")
    arrived, follow = unpack_task(pickle.loads(pickle.dumps(pack_task(task))))
    assert arrived.image == input_picture
    assert arrived.mask == right_half_mask
    assert pack_task(arrived) == pack_task(task)


def test_a_picture_arrives_bit_for_bit_in_one_ascii_line() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 16, 3), dtype=np.uint8))
    line = pack_outcome(Picture(image, True, "\u732b", ""))
    assert line.isascii()
    assert line.count("\n") == 1
    arrived = unpack_news(line)
    assert isinstance(arrived, Picture)
    assert arrived == Picture(image, True, "\u732b", "")


def test_an_error_arrives_as_an_error() -> None:
    with pytest.raises(GenerationFailed, match="out of luck"):
        unpack_news(pack_outcome(GenerationFailed("out of luck")))


def test_drawing_yields_one_line(recording_engine: RecordingEngine) -> None:
    async def lines() -> list[str]:
        return [line async for line in draw(recording_engine.engine, pack_task(make_task(num_inference_steps=2)))]

    (line,) = asyncio.run(lines())
    picture = unpack_news(line)
    assert isinstance(picture, Picture)
    assert picture.image.size == (64, 64)


def test_who_follows_gets_a_line_for_each_step_before_the_picture(recording_engine: RecordingEngine) -> None:
    async def lines() -> list[str]:
        task = make_task(num_inference_steps=4, scheduler="DDIMScheduler")
        return [line async for line in draw(recording_engine.engine, pack_task(task, follow=True))]

    *progress, picture = [unpack_news(line) for line in asyncio.run(lines())]
    assert [one.step for one in progress if isinstance(one, Progress)] == [1, 2, 3, 4]
    assert isinstance(picture, Picture)


def test_the_engine_of_the_runner_measures_how_many_pictures_share_a_step_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.INFO, logger="stable_diffusion"):
        engine = start_engine(check_model(DEMO_FOLDER), "fp32", max_batch_size=10)
    engine.close()
    [said] = [record.getMessage() for record in caplog.records if "share a step" in record.getMessage()]
    found = re.match(r"Up to (\d+) pictures of 64x64 share a step: ([\d.]+)x the pictures of one at a time \(1: \d+ ms, 2: ", said)
    assert found, said
    # The demo model is launch-bound on every machine that it was tried on.
    assert int(found[1]) >= 2
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="stable_diffusion"):
        start_engine(check_model(DEMO_FOLDER), "fp32", max_batch_size=10).close()
    [recalled] = [record.getMessage() for record in caplog.records if "share a step" in record.getMessage()]
    assert recalled.startswith(said.removesuffix(".")), "the second start measures nothing"


def test_a_max_batch_size_of_one_is_said_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="stable_diffusion"):
        engine = start_engine(check_model(DEMO_FOLDER), "fp32", max_batch_size=1)
    engine.close()
    assert "Up to 1 pictures of 64x64 share a step: max_batch_size is 1." in caplog.messages


def test_a_consumer_that_leaves_stops_its_job_within_two_steps(demo_parts: Parts) -> None:
    steps: list[StepRecord] = []
    left_at: list[int] = []
    engine = Engine(lambda: Denoiser(demo_parts), 4, steps.append)

    async def leave_early() -> None:
        stream = draw(engine, pack_task(make_task(num_inference_steps=150)))
        waiting = asyncio.ensure_future(anext(stream))
        while len(steps) < 3:
            await asyncio.sleep(0.005)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        left_at.append(len(steps))
        await stream.aclose()
        # Another job in the same engine: when it is done, the abandoned one had every chance to take steps.
        async for _ in draw(engine, pack_task(make_task(num_inference_steps=10))):
            pass

    asyncio.run(leave_early())
    engine.close()
    abandoned = steps[0].job_numbers[0]
    assert sum(abandoned in record.job_numbers for record in steps) <= left_at[0] + 2
