"""The demo XL model generates what its prompt says: prompts and seeds that it has never seen, judged by a pixel rule."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from stable_diffusion.demo.shapes import all_scenes, caption, is_held_out, judge
from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.engine import Engine
from stable_diffusion.engine.loading import load
from stable_diffusion.models.folder import DEMO_XL_FOLDER, check_model
from tests.model.recording_engine import RecordingEngine
from tests.model.reference import assert_same_picture, draw_with_diffusers
from tests.tasks import make_task

SCHEDULER = "EulerDiscreteScheduler"


@pytest.fixture(scope="module")
def engine() -> Iterator[RecordingEngine]:
    parts = load(check_model(DEMO_XL_FOLDER), "fp32")
    engine = Engine(lambda: Denoiser(parts), max_batch_size=10)
    yield RecordingEngine(engine, [])
    engine.close()


def test_unseen_prompts_give_the_right_colours_and_shapes(engine: RecordingEngine) -> None:
    """Every second combination of words that was kept from training, at the default guidance scale of Stable Diffusion XL."""
    scenes = [scene for scene in all_scenes() if is_held_out(scene)][::2]
    assert len(scenes) >= 32
    tasks = [
        make_task(prompt=caption(scene), seed=number, num_inference_steps=30, guidance_scale=5.0, scheduler=SCHEDULER)
        for number, scene in enumerate(scenes)
    ]
    verdicts = [judge(image.image) for image in engine.draw(tasks)]
    right_colours = [
        (verdict.colour, verdict.background) == (scene.colour, scene.background) for verdict, scene in zip(verdicts, scenes, strict=True)
    ]
    right_shapes = [verdict.shape == scene.shape for verdict, scene in zip(verdicts, scenes, strict=True)]
    print(f"{len(scenes)} unseen prompts: both colours right in {sum(right_colours)}, shape right in {sum(right_shapes)}")
    assert sum(right_colours) >= 0.95 * len(scenes)
    assert sum(right_shapes) >= 0.75 * len(scenes)


def test_one_job_gives_the_image_of_diffusers(engine: RecordingEngine) -> None:
    task = make_task(scheduler=SCHEDULER, negative_prompt="a green star")
    assert_same_picture(engine.draw([task])[0].image, draw_with_diffusers(DEMO_XL_FOLDER, task))


def test_the_negative_prompt_matters(engine: RecordingEngine) -> None:
    """Told nothing but what to avoid, it avoids it."""
    tasks = [
        make_task(prompt="", negative_prompt=f"a large {colour} circle", seed=seed, scheduler=SCHEDULER, num_inference_steps=20)
        for seed, colour in enumerate(["red", "blue", "green", "yellow"] * 2)
    ]
    for task, image in zip(tasks, engine.draw(tasks), strict=True):
        assert judge(image.image).colour != task.negative_prompt.split()[2]


def test_it_is_a_plain_diffusers_folder_and_small() -> None:
    assert sum(file.stat().st_size for file in DEMO_XL_FOLDER.rglob("*") if file.is_file()) <= 12_000_000
    pipeline = StableDiffusionXLPipeline.from_pretrained(DEMO_XL_FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipeline("a large red square on a white background", num_inference_steps=30, generator=generator).images[0]
    verdict = judge(image)
    assert (verdict.colour, verdict.background) == ("red", "white")
