"""Prompts as people write them: long, weighted, composed, changing with the steps; against diffusers and against plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from stable_diffusion.core.errors import InvalidRequest
from stable_diffusion.core.telemetry import StepRecord
from stable_diffusion.core.types import Task
from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.engine import Engine
from stable_diffusion.engine.job import Job
from stable_diffusion.engine.loading import Parts, load
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from tests.model.recording_engine import RecordingEngine
from tests.tasks import make_task

SCHEDULER = "DDIMScheduler"
LONG = "a small red circle on a blue background, " * 12
OTHER_LONG = "a green square, bottom left, " * 9


@pytest.fixture(scope="module")
def embeddings_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A textual inversion in A1111's format, one in diffusers', each of several vectors."""
    folder = tmp_path_factory.mktemp("embeddings")
    generator = torch.Generator().manual_seed(0)
    save_file({"emb_params": torch.randn(3, 96, generator=generator)}, folder / "striped.safetensors")
    save_file({"<odd>": torch.randn(96, generator=generator)}, folder / "odd.safetensors")
    return folder


@pytest.fixture(scope="module")
def parts(embeddings_folder: Path) -> Parts:
    return load(replace(check_model(DEMO_FOLDER), embeddings=embeddings_folder), "fp32")


@pytest.fixture(scope="module")
def engine(parts: Parts) -> Iterator[RecordingEngine]:
    steps: list[StepRecord] = []
    engine = Engine(lambda: Denoiser(parts), max_batch_size=8, on_step=steps.append)
    yield RecordingEngine(engine, steps)
    engine.close()


@pytest.fixture
def pipeline() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO_FOLDER, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return pipeline


def with_diffusers(pipeline: StableDiffusionPipeline, task: Task, **texts: Any) -> Image.Image:
    image: Image.Image
    (image,) = pipeline(
        **(texts or {"prompt": task.prompt, "negative_prompt": task.negative_prompt}),
        num_inference_steps=task.num_inference_steps,
        guidance_scale=task.guidance_scale,
        width=task.width,
        height=task.height,
        generator=torch.Generator("cpu").manual_seed(task.seed),
    ).images
    return image


def in_chunks(pipeline: StableDiffusionPipeline, prompt: str) -> torch.Tensor:
    """Embeddings of chunks of 75 tokens, cut behind the last comma of each, as a script of diffusers' users would compute them."""
    ids = pipeline.tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids
    comma = pipeline.tokenizer.convert_tokens_to_ids(",</w>")
    start, end = pipeline.tokenizer.bos_token_id, pipeline.tokenizer.eos_token_id
    chunks = []
    while ids:
        count = min(75, len(ids))
        if len(ids) > 75 and comma in ids[55:75] and ids[75] != comma:
            count = 75 - ids[:75][::-1].index(comma)
        chunks.append([start, *ids[:count], end, *[end] * (75 - count)])
        ids = ids[count:]
    with torch.inference_mode():
        encoded: torch.Tensor = pipeline.text_encoder(torch.tensor(chunks))[0]
    return encoded.reshape(1, 77 * len(chunks), -1)


def levels_apart(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


def embeddings_at(parts: Parts, task: Task, step: int) -> torch.Tensor:
    """The embeddings (rows, tokens, width) of a job's step, counted from 1."""
    denoiser = Denoiser(parts)
    job = Job(task, on_end=lambda outcome: None)
    job.tensors = denoiser.prepare(task)
    job.tensors.step_index = step - 1
    return denoiser.unet_inputs([job]).embeddings


def test_prompts_of_several_chunks_give_the_image_that_diffusers_makes_of_their_embeddings(
    engine: RecordingEngine, pipeline: StableDiffusionPipeline
) -> None:
    task = make_task(scheduler=SCHEDULER, prompt=LONG, negative_prompt=OTHER_LONG)
    prompt, negative = in_chunks(pipeline, LONG.strip()), in_chunks(pipeline, OTHER_LONG.strip())
    assert prompt.shape == negative.shape == (1, 154, 96)
    expected = with_diffusers(pipeline, task, prompt_embeds=prompt, negative_prompt_embeds=negative)
    assert levels_apart(engine.draw([task])[0].image, expected) == 0


def test_the_last_words_of_a_long_prompt_count(engine: RecordingEngine) -> None:
    filling = "nice, " * 50
    red, blue = engine.draw([make_task(prompt=f"{filling} a {colour} circle") for colour in ("red", "blue")])
    assert levels_apart(red.image, blue.image) > 30


def test_prompts_of_different_length_share_a_step_and_are_within_two_levels_of_alone(engine: RecordingEngine) -> None:
    prompts = ["a red circle", LONG, OTHER_LONG * 2, "a blue square"]
    tasks = [make_task(scheduler=SCHEDULER, prompt=prompt, seed=seed) for seed, prompt in enumerate(prompts)]
    alone = [engine.draw([task])[0].image for task in tasks]
    engine.steps.clear()
    together = engine.draw(tasks)
    assert max(len(step.job_numbers) for step in engine.steps) == len(tasks)
    assert max(levels_apart(one, other.image) for one, other in zip(alone, together, strict=True)) <= 2


def test_a_prompt_beyond_the_most_chunks_is_refused_or_cut_as_the_task_says(engine: RecordingEngine) -> None:
    task = make_task(prompt="very nice, " * 180, num_inference_steps=2)
    with pytest.raises(InvalidRequest, match="more than 450 tokens"):
        engine.draw([task])
    (image,) = engine.draw([replace(task, cut_prompts=True)])
    assert image.dropped_prompt.startswith("very nice")


def test_weights_scale_embeddings_and_keep_their_mean(parts: Parts) -> None:
    plain = embeddings_at(parts, make_task(prompt="a red circle", guidance_scale=1.0), 1)[0]
    weighted = embeddings_at(parts, make_task(prompt="a (red:1.5) circle", guidance_scale=1.0, prompt_syntax="a1111"), 1)[0]
    expected = plain.clone()
    expected[2] *= 1.5  # start, a, red
    expected *= plain.mean() / expected.mean()
    assert torch.allclose(weighted, expected, atol=1e-5)
    assert not torch.allclose(weighted, plain, atol=1e-2)


def test_parentheses_are_text_in_plain_prompts_and_weights_in_a1111s(parts: Parts) -> None:
    written = make_task(prompt="a (red) circle", guidance_scale=1.0)
    assert not torch.equal(embeddings_at(parts, written, 1), embeddings_at(parts, replace(written, prompt="a red circle"), 1))
    escaped = replace(written, prompt=r"a \(red\) circle", prompt_syntax="a1111")
    assert torch.equal(embeddings_at(parts, written, 1), embeddings_at(parts, escaped, 1))


def test_break_begins_a_new_chunk(parts: Parts) -> None:
    task = make_task(prompt="a red circle BREAK a blue background", guidance_scale=1.0, prompt_syntax="a1111")
    both = embeddings_at(parts, task, 1)
    assert both.shape == (1, 154, 96)
    first = embeddings_at(parts, make_task(prompt="a red circle", guidance_scale=1.0), 1)
    assert torch.allclose(both[:, :77], first, atol=1e-5)


@pytest.mark.parametrize(
    ("prompt", "by_step"),
    [
        ("a [red:blue:0.5] circle", ["red"] * 4 + ["blue"] * 4),
        ("a [red:blue:2] circle", ["red"] * 2 + ["blue"] * 6),
        ("a [red|blue] circle", ["red", "blue"] * 4),
    ],
)
def test_edited_prompts_change_with_the_steps(parts: Parts, prompt: str, by_step: list[str]) -> None:
    task = make_task(scheduler=SCHEDULER, prompt=prompt, prompt_syntax="a1111", num_inference_steps=8)
    for step, colour in enumerate(by_step, 1):
        expected = embeddings_at(parts, make_task(scheduler=SCHEDULER, prompt=f"a {colour} circle"), 1)
        assert torch.equal(embeddings_at(parts, task, step), expected), (step, colour)


def test_a_step_of_a_second_order_scheduler_has_one_text(parts: Parts) -> None:
    task = make_task(
        scheduler="HeunDiscreteScheduler", prompt="[red|blue] circle", prompt_syntax="a1111", num_inference_steps=4, guidance_scale=1.0
    )
    first, second, third = (embeddings_at(parts, task, call) for call in (1, 2, 3))
    assert torch.equal(first, second)
    assert not torch.equal(second, third)


def test_parts_joined_with_and_are_weighted_and_add_up(engine: RecordingEngine) -> None:
    task = make_task(scheduler=SCHEDULER, prompt="a red circle")
    halves = replace(task, prompt="a red circle :0.5 AND a red circle :0.5", prompt_syntax="a1111", parts=2)
    other = replace(task, prompt="a red circle AND a blue background :0.8", prompt_syntax="a1111", parts=2)
    engine.steps.clear()
    images = [outcome.image for outcome in engine.draw([task, halves, other])]
    assert levels_apart(images[0], images[1]) <= 2
    assert levels_apart(images[0], images[2]) > 20
    assert max(step.rows for step in engine.steps) == 2 + 3 + 3


def test_parts_follow_composable_diffusion(parts: Parts) -> None:
    denoiser = Denoiser(parts)
    task = make_task(scheduler=SCHEDULER, prompt="a red circle AND a blue square :0.4", prompt_syntax="a1111", parts=2, guidance_scale=5.0)
    job = Job(task, on_end=lambda outcome: None)
    job.tensors = denoiser.prepare(task)
    before = job.tensors.latents
    predicted = denoiser.predict([job])[0]
    plain, circle, square = predicted
    guided = plain + 5.0 * (circle - plain) + 5.0 * 0.4 * (square - plain)
    scheduler = DDIMScheduler.from_config(parts.scheduler.config)
    scheduler.set_timesteps(task.num_inference_steps)
    expected = scheduler.step(guided[None], scheduler.timesteps[0], before, eta=0.0, return_dict=False)[0]
    denoiser.advance(job, predicted)
    assert torch.allclose(job.tensors.latents, expected, atol=1e-5)


def test_clip_skip_gives_the_image_of_diffusers(engine: RecordingEngine, pipeline: StableDiffusionPipeline) -> None:
    # diffusers 0.42 still looks for the last layer where transformers 4 had it.
    pipeline.text_encoder.text_model = SimpleNamespace(final_layer_norm=pipeline.text_encoder.final_layer_norm)
    task = make_task(scheduler=SCHEDULER, negative_prompt="green", clip_skip=2)
    (image,) = engine.draw([task])
    # Its pipeline skips layers for the prompt only; A1111 does for both.
    with torch.inference_mode():
        prompt, _ = pipeline.encode_prompt(task.prompt, "cpu", 1, False, clip_skip=1)
        negative, _ = pipeline.encode_prompt(task.negative_prompt, "cpu", 1, False, clip_skip=1)
    expected = with_diffusers(pipeline, task, prompt_embeds=prompt, negative_prompt_embeds=negative)
    assert levels_apart(image.image, expected) == 0


@pytest.mark.parametrize(("name", "token"), [("striped", "striped"), ("odd", "<odd>")])
def test_a_textual_inversion_gives_the_image_of_diffusers(
    engine: RecordingEngine, pipeline: StableDiffusionPipeline, embeddings_folder: Path, name: str, token: str
) -> None:
    pipeline.load_textual_inversion(str(embeddings_folder / f"{name}.safetensors"), token=token)
    task = make_task(scheduler=SCHEDULER, prompt=f"a {name} circle on a blue background")
    plain = engine.draw([replace(task, prompt="a circle on a blue background")])[0].image
    image = engine.draw([task])[0].image
    assert levels_apart(image, plain) > 8
    assert levels_apart(image, with_diffusers(pipeline, replace(task, prompt=f"a {token} circle on a blue background"))) == 0


def test_the_guidance_scale_as_an_input_is_that_of_diffusers(pipeline: StableDiffusionPipeline) -> None:
    from stable_diffusion.engine.denoiser import guidance_embedding

    for scale in (1.0, 1.5, 8.0, math.pi):
        theirs = pipeline.get_guidance_scale_embedding(torch.tensor([scale - 1.0]), embedding_dim=256)
        assert torch.equal(guidance_embedding(scale, 256), theirs)
