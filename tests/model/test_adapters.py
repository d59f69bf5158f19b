"""LoRAs by rows: one job gives the image of diffusers and peft bit for bit, and jobs with different ones share a UNet call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image

from stable_diffusion.core.errors import InvalidRequest
from stable_diffusion.core.telemetry import StepRecord
from stable_diffusion.core.types import LoraChoice, Task
from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.engine import Engine
from stable_diffusion.engine.job import Job
from stable_diffusion.engine.loading import Parts, load
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from stable_diffusion.models.loras import LoraFolder
from tests.lora_files import ATTENTION, CONVOLUTIONS, FEED_FORWARD, TEXT_ENCODER, changes, save_as_diffusers, save_as_kohya
from tests.model.recording_engine import RecordingEngine
from tests.tasks import make_task

SCHEDULER = "EulerDiscreteScheduler"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    save_as_diffusers(folder / "attention.safetensors", changes(ATTENTION, seed=1))
    save_as_diffusers(folder / "feed_forward.safetensors", changes(FEED_FORWARD, rank=8, seed=2))
    save_as_kohya(folder / "locon.safetensors", changes(ATTENTION | CONVOLUTIONS, seed=3), alpha=3.0)
    save_as_kohya(folder / "text.safetensors", changes(ATTENTION, seed=4), changes(TEXT_ENCODER, seed=5, size=0.2))
    return folder


@pytest.fixture(scope="module")
def parts(folder: Path) -> Parts:
    return load(replace(check_model(DEMO_FOLDER), loras=folder), "fp32")


@pytest.fixture(scope="module")
def engine(parts: Parts) -> Iterator[RecordingEngine]:
    steps: list[StepRecord] = []
    engine = Engine(lambda: Denoiser(parts), max_batch_size=8, on_step=steps.append)
    yield RecordingEngine(engine, steps)
    engine.close()


@pytest.fixture(scope="module")
def choose(folder: Path) -> Callable[..., tuple[LoraChoice, ...]]:
    files = LoraFolder(folder, check_model(DEMO_FOLDER)).look().files

    def chosen(**weights: float) -> tuple[LoraChoice, ...]:
        return tuple(LoraChoice(name, weight, weight, files[name].hash, files[name].size_bytes) for name, weight in weights.items())

    return chosen


def with_diffusers(folder: Path, task: Task) -> Image.Image:
    """The task as a user of diffusers and peft would generate it, with adapters that are not fused."""
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO_FOLDER, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    for choice in task.loras:
        pipeline.load_lora_weights(folder / f"{choice.name}.safetensors", adapter_name=choice.name)
    pipeline.set_adapters([choice.name for choice in task.loras], [choice.unet_weight for choice in task.loras])
    image: Image.Image
    (image,) = pipeline(
        prompt=task.prompt,
        negative_prompt=task.negative_prompt,
        num_inference_steps=task.num_inference_steps,
        guidance_scale=task.guidance_scale,
        width=task.width,
        height=task.height,
        generator=torch.Generator("cpu").manual_seed(task.seed),
    ).images
    return image


def levels_apart(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # several adapters, as a user has them
@pytest.mark.parametrize(
    "weights",
    [
        {"attention": 1.0},
        {"attention": 0.5},
        {"locon": 1.0},
        {"locon": -0.7},
        {"text": 1.0},
        {"attention": 0.3, "feed_forward": 1.2, "text": 0.4},
    ],
    ids=str,
)
def test_one_job_gives_the_image_of_diffusers_and_peft(
    engine: RecordingEngine, folder: Path, choose: Callable[..., tuple[LoraChoice, ...]], weights: dict[str, float]
) -> None:
    task = make_task(scheduler=SCHEDULER, loras=choose(**weights), negative_prompt="green")
    image, plain = engine.draw([task])[0].image, engine.draw([replace(task, loras=())])[0].image
    assert levels_apart(image, plain) > 8, "the LoRA changes the image"
    assert levels_apart(image, with_diffusers(folder, task)) == 0


def test_jobs_with_different_loras_share_every_step_and_are_within_two_levels_of_alone(
    engine: RecordingEngine, choose: Callable[..., tuple[LoraChoice, ...]]
) -> None:
    mixes = [{}, {"attention": 1.0}, {"locon": 0.8}, {"attention": 0.5, "text": 1.0}, {"feed_forward": 1.0}]
    tasks = [make_task(scheduler=SCHEDULER, seed=index, loras=choose(**mix)) for index, mix in enumerate(mixes)]
    alone = [engine.draw([task])[0].image for task in tasks]
    engine.steps.clear()
    together = engine.draw(tasks)
    assert max(len(step.job_numbers) for step in engine.steps) == len(tasks)
    assert [levels_apart(one, other.image) <= 2 for one, other in zip(alone, together, strict=True)] == [True] * len(tasks)


def test_rows_without_an_adapter_are_bitwise_those_of_a_plain_call(parts: Parts, choose: Callable[..., tuple[LoraChoice, ...]]) -> None:
    denoiser = Denoiser(parts)

    def predicted(loras: tuple[LoraChoice, ...]) -> list[torch.Tensor]:
        tasks = [make_task(seed=1), make_task(seed=2, loras=loras), make_task(seed=3)]
        jobs = [Job(task, on_end=lambda outcome: None) for task in tasks]
        for job in jobs:
            while not denoiser.can_prepare(job):
                time.sleep(0.001)
            job.tensors = denoiser.prepare(job.task, job.claim)
        return denoiser.predict(jobs)

    plain, mixed = predicted(()), predicted(choose(attention=1.0, locon=0.5))
    assert torch.equal(plain[0], mixed[0])
    assert torch.equal(plain[2], mixed[2])
    assert not torch.equal(plain[1], mixed[1])


def test_after_a_job_with_a_lora_the_model_is_as_before(engine: RecordingEngine, choose: Callable[..., tuple[LoraChoice, ...]]) -> None:
    task = make_task(scheduler=SCHEDULER)
    before = engine.draw([task])[0].image
    with_lora = engine.draw([replace(task, loras=choose(text=1.0))])[0].image
    after = engine.draw([task])[0].image
    again = engine.draw([replace(task, loras=choose(text=1.0))])[0].image
    assert levels_apart(before, after) == 0
    assert levels_apart(with_lora, again) == 0


def test_a_file_that_is_gone_fails_its_job_by_name_and_no_other(engine: RecordingEngine) -> None:
    with pytest.raises(InvalidRequest, match="loras: nowhere: its file is gone"):
        engine.draw([make_task(loras=(LoraChoice("nowhere", 1.0, 1.0, "0" * 12, 1000),))])
    assert engine.draw([make_task()])[0].image.size == (64, 64)


def test_values_that_are_no_numbers_fail_the_job_by_name(folder: Path, engine: RecordingEngine) -> None:
    broken = changes(ATTENTION, seed=9)
    name = next(iter(broken))
    broken[name][0][0, 0] = torch.nan
    save_as_diffusers(folder / "broken.safetensors", broken)
    file = LoraFolder(folder, check_model(DEMO_FOLDER)).look().files["broken"]
    with pytest.raises(InvalidRequest, match="loras: broken: it contains NaN or infinity"):
        engine.draw([make_task(loras=(LoraChoice("broken", 1.0, 1.0, file.hash, file.size_bytes),))])
