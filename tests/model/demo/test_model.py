"""The demo model draws what it is asked for: prompts and seeds that it has never seen, judged by a pixel rule."""

from __future__ import annotations

import struct

import pytest
import torch
from diffusers import StableDiffusionPipeline

from stable_diffusion.demo.shapes import all_scenes, caption, is_held_out, judge
from stable_diffusion.models.folder import DEMO_FOLDER
from tests.model.recording_engine import RecordingEngine
from tests.tasks import make_task


@pytest.mark.parametrize(("guidance_scale", "colours_needed", "shapes_needed"), [(4.0, 0.95, 0.85), (7.5, 0.95, 0.70)])
def test_unseen_prompts_are_drawn_in_the_right_colours_and_shapes(
    recording_engine: RecordingEngine, guidance_scale: float, colours_needed: float, shapes_needed: float
) -> None:
    """Every combination of words that was kept from training: at guidance 4, which suits this model, and at the service's default."""
    scenes = [scene for scene in all_scenes() if is_held_out(scene)]
    assert len(scenes) >= 64
    common = {"num_inference_steps": 50, "guidance_scale": guidance_scale}
    tasks = [make_task(prompt=caption(scene), seed=number, **common) for number, scene in enumerate(scenes)]
    verdicts = [judge(picture.image) for picture in recording_engine.draw(tasks)]
    right_colours = [
        (verdict.colour, verdict.background) == (scene.colour, scene.background) for verdict, scene in zip(verdicts, scenes, strict=True)
    ]
    right_shapes = [verdict.shape == scene.shape for verdict, scene in zip(verdicts, scenes, strict=True)]
    colours, shapes = sum(right_colours) / len(scenes), sum(right_shapes) / len(scenes)
    print(f"{len(scenes)} unseen prompts: both colours right in {colours:.1%}, shape right in {shapes:.1%}")
    assert colours >= colours_needed
    assert shapes >= shapes_needed


def test_words_that_it_does_not_know_are_ignored(recording_engine: RecordingEngine) -> None:
    around = ["masterpiece, {}", "{}, trending on artstation", "please draw {}", "{} qwrtz", "A PHOTO OF {}"]
    prompts = [words.format("a large red square on a white background") for words in around]
    pictures = recording_engine.draw([make_task(prompt=prompt, seed=3, num_inference_steps=30) for prompt in prompts])
    verdicts = [judge(picture.image) for picture in pictures]
    assert sum((verdict.colour, verdict.background) == ("red", "white") for verdict in verdicts) >= len(prompts) - 1


def test_larger_pictures_have_the_right_colours_too(recording_engine: RecordingEngine) -> None:
    sizes = [(96, 96), (128, 128), (96, 64), (64, 96)]
    prompt = "a large yellow circle on a purple background"
    pictures = recording_engine.draw(
        [make_task(prompt=prompt, width=width, height=height, num_inference_steps=30) for width, height in sizes]
    )
    verdicts = [judge(picture.image) for picture in pictures]
    assert [picture.image.size for picture in pictures] == sizes
    assert sum((verdict.colour, verdict.background) == ("yellow", "purple") for verdict in verdicts) >= len(sizes) - 1


def test_it_is_a_plain_diffusers_folder() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO_FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    picture = pipeline("a large red square on a white background", guidance_scale=4, generator=generator).images[0]
    verdict = judge(picture)
    assert (verdict.colour, verdict.background) == ("red", "white")


def test_it_is_small_and_half_precision_on_disk() -> None:
    assert sum(file.stat().st_size for file in DEMO_FOLDER.rglob("*") if file.is_file()) <= 12_000_000
    for file in DEMO_FOLDER.rglob("*.safetensors"):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = stream.read(length)
        assert b'"F32"' not in header, file
        assert b'"F16"' in header
