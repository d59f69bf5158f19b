"""Every way of computing gives eager's results, or leaves calls to eager and says so; afterwards the model is as before."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from stable_diffusion.core.types import LoraChoice, Task
from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.job import Job
from stable_diffusion.engine.loading import Parts, load
from stable_diffusion.engine.unet_calls import UNetCalls
from stable_diffusion.engine.ways import EAGER, Way, obstacle, tolerance, way_named, ways_to_try
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from stable_diffusion.models.loras import LoraFolder
from tests.lora_files import ATTENTION, CONVOLUTIONS, changes, save_as_kohya
from tests.model.stand_in_graphs import StandInGraphs
from tests.model.tiny_models import write_tiny_xl
from tests.tasks import make_task, task_of_kind

GRAPHS = Way(graphs=True)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    save_as_kohya(folder / "locon.safetensors", changes(ATTENTION | CONVOLUTIONS, seed=3), alpha=3.0)
    return folder


@pytest.fixture(scope="module")
def parts(lora: Path) -> Parts:
    return load(replace(check_model(DEMO_FOLDER), loras=lora), "fp32")


@pytest.fixture(scope="module")
def choices(lora: Path) -> tuple[LoraChoice, ...]:
    file = LoraFolder(lora, check_model(DEMO_FOLDER)).look().files["locon"]
    return (LoraChoice("locon", 1.0, 1.0, file.hash, file.size_bytes),)


@pytest.fixture(scope="module")
def xl_parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return load(check_model(write_tiny_xl(tmp_path_factory.mktemp("xl") / "tiny-xl")), "fp32")


def replaying(parts: Parts, most_jobs: int = 3) -> tuple[Denoiser, StandInGraphs]:
    graphs = StandInGraphs()
    denoiser = Denoiser(parts, lambda: graphs)
    assert denoiser.use(GRAPHS, 64, 64, range(1, most_jobs + 1)) == 2 * most_jobs
    return denoiser, graphs


def prepared(denoiser: Denoiser, tasks: list[Task]) -> list[Job]:
    jobs = [Job(task, on_end=lambda outcome: None) for task in tasks]
    for job in jobs:
        while not denoiser.can_prepare(job):
            time.sleep(0.001)
        job.tensors = denoiser.prepare(job.task, job.claim)
    return jobs


def same(denoiser: Denoiser, parts: Parts, tasks: list[Task]) -> bool:
    """Whether the jobs' next step is computed as an eager denoiser computes it, bit for bit."""
    ours, theirs = denoiser.predict(prepared(denoiser, tasks)), Denoiser(parts).predict(prepared(Denoiser(parts), tasks))
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_lora_on_off_on_gives_eagers_results_and_only_calls_without_one_are_replayed(parts: Parts, choices: tuple[LoraChoice, ...]) -> None:
    denoiser, graphs = replaying(parts)
    found = []
    for seed, loras in enumerate([(), choices, (), choices, ()]):
        assert same(denoiser, parts, [make_task(seed=seed, loras=loras), make_task(seed=10 + seed)])
        found.append((denoiser.execution, graphs.replays))
    assert found == [("graphs", 1), ("eager", 1), ("graphs", 2), ("eager", 2), ("graphs", 3)]


def test_a_lora_that_is_active_while_calls_are_recorded_would_show(parts: Parts, choices: tuple[LoraChoice, ...]) -> None:
    """The stand-in holds what was computed when it recorded: proof that it can fail."""
    (job,) = prepared(denoiser := Denoiser(parts), [make_task(loras=choices)])
    inputs = denoiser.unet_inputs([job])
    with torch.inference_mode():
        replay, result = StandInGraphs()(lambda: denoiser.call_unet(inputs))
        with_lora = result.clone()
        inputs.latents.mul_(0.5)
        replay()
        assert torch.equal(result, denoiser.call_unet(inputs))
        assert not torch.equal(result, with_lora)
        assert not torch.equal(result, denoiser.call_unet(replace(inputs, adapters=())))


@pytest.mark.parametrize(
    ("prompts", "execution"),
    [
        (["a red circle AND a green square"], "graphs"),  # three rows
        (["a red circle AND a green square :0.5 AND blue", "a red circle"], "graphs"),
        (["a red circle", "a green square " * 40], "eager"),  # of different lengths: with a mask
        (["red circle " * 60], "eager"),  # two chunks
    ],
)
def test_prompts_of_several_parts_are_replayed_and_masked_ones_are_left_to_eager(parts: Parts, prompts: list[str], execution: str) -> None:
    denoiser, _ = replaying(parts)
    tasks = [make_task(seed=seed, prompt=prompt, prompt_syntax="a1111") for seed, prompt in enumerate(prompts)]
    for guidance in (7.5, 3.0):
        assert same(denoiser, parts, [replace(task, guidance_scale=guidance) for task in tasks])
        assert denoiser.execution == execution


def test_stable_diffusion_xls_inputs_are_filled_anew_for_each_replay(xl_parts: Parts) -> None:
    denoiser, graphs = replaying(xl_parts)
    for number, prompt in enumerate(["a red circle", "a blue square on green", ""]):
        tasks = [make_task(prompt=prompt, seed=number), make_task(prompt=f"{prompt} {number}", negative_prompt="green", seed=9)]
        assert same(denoiser, xl_parts, tasks)
        assert same(denoiser, xl_parts, [replace(tasks[0], guidance_scale=1.0)])
    assert (denoiser.execution, graphs.replays) == ("graphs", 6)


@pytest.mark.parametrize("kind", ["txt2img", "img2img", "inpaint"])
def test_whole_images_of_all_kinds_are_those_of_eager(
    parts: Parts, input_picture: Image.Image, right_half_mask: Image.Image, kind: str
) -> None:
    task = task_of_kind(input_picture, right_half_mask, kind=kind, strength=0.8, guidance_end=0.5)
    denoiser, graphs = replaying(parts, most_jobs=1)
    ended = []
    for one in (denoiser, Denoiser(parts)):
        (job,) = prepared(one, [task])
        while not job.is_denoised:
            one.advance(job, one.predict([job])[0])
        assert job.tensors is not None
        ended.append(job.tensors.latents)
    # The latents of img2img have another memory format than the buffers, so convolutions round differently.
    ours, theirs = ended
    assert torch.equal(ours, theirs) or (kind == "img2img" and torch.allclose(ours, theirs, rtol=0, atol=1e-4))
    assert graphs.replays > 4


def test_another_size_is_left_to_eager(parts: Parts) -> None:
    denoiser, graphs = replaying(parts, most_jobs=1)
    assert same(denoiser, parts, [make_task(width=96)])
    assert (denoiser.execution, graphs.replays) == ("eager", 0)


def layout(parts: Parts) -> dict[str, tuple[int, ...]]:
    return {name: parameter.stride() for name, parameter in parts.unet.named_parameters()}


def test_channels_last_gives_almost_the_same_and_afterwards_the_model_is_as_before(parts: Parts) -> None:
    denoiser = Denoiser(parts)
    inputs, before = denoiser.sample_inputs(2, 64, 64), layout(parts)
    expected = denoiser.compute(inputs)
    assert denoiser.use(Way(channels_last=True), 64, 64, [1, 2]) == 4
    changed = denoiser.compute(inputs)
    assert denoiser.execution == "channels_last"
    assert layout(parts) != before
    assert changed.stride() == expected.stride(), "the rest of a step keeps its memory format"
    assert float((changed - expected).norm() / expected.norm()) < 1e-5
    denoiser.call_unet.reset()
    assert layout(parts) == before
    assert torch.equal(denoiser.compute(inputs), expected)
    assert denoiser.execution == "eager"


def test_a_way_that_cannot_be_set_up_leaves_the_model_as_before(parts: Parts) -> None:
    def broken() -> StandInGraphs:
        raise RuntimeError("no graphs, on purpose")

    denoiser, before = Denoiser(parts, broken), layout(parts)
    inputs = denoiser.sample_inputs(1, 64, 64)
    expected = denoiser.compute(inputs)
    with pytest.raises(RuntimeError, match="on purpose"):
        denoiser.use(Way(channels_last=True, graphs=True), 64, 64, [1])
    assert layout(parts) == before
    assert denoiser.call_unet.way == EAGER
    assert torch.equal(denoiser.compute(inputs), expected)


def test_one_way_takes_the_place_of_another(parts: Parts) -> None:
    denoiser, graphs = replaying(parts)
    denoiser.use(Way(channels_last=True), 64, 64, [1])
    denoiser.compute(denoiser.sample_inputs(1, 64, 64))
    assert (denoiser.execution, graphs.replays) == ("channels_last", 0)
    denoiser.use(EAGER, 64, 64, [1])
    assert same(denoiser, parts, [make_task()])


def test_a_compiled_unet_takes_the_shapes_that_it_was_compiled_for_and_compiles_no_other(
    xl_parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile's tracing, with a backend that does not generate code."""
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        compiled.append(len(inputs))
        return graph.forward

    denoiser = Denoiser(xl_parts)
    monkeypatch.setattr(denoiser, "call_unet", UNetCalls(xl_parts.unet, compiler=backend))
    denoiser.use(Way(compiled=True), 64, 64, [1, 2, 3])
    graphs = len(compiled)
    for count in (1, 2, 3):
        assert same(denoiser, xl_parts, [make_task(seed=seed) for seed in range(count)])
        assert denoiser.execution == "compile"
    assert same(denoiser, xl_parts, [make_task(seed=1), make_task(guidance_scale=1.0)])
    assert denoiser.execution == "compile"
    for tasks in ([make_task(width=96)], [make_task(guidance_scale=1.0)], [make_task(seed=seed) for seed in range(4)]):
        assert same(denoiser, xl_parts, tasks)
        assert denoiser.execution == "eager"
    assert len(compiled) == graphs > 0
    denoiser.call_unet.reset()


def test_names_of_ways_are_those_of_the_setting() -> None:
    for name in ("eager", "graphs", "channels_last+graphs", "channels_last+compile+graphs"):
        assert way_named(name).name == name
    assert way_named("eager") == EAGER


def test_a_cpu_tries_only_what_it_can_and_takes_only_the_same_bits() -> None:
    assert all(not obstacle(way, "cpu") for way in ways_to_try("cpu"))
    assert obstacle(Way(channels_last=True, graphs=True), "cpu") == "CUDA graphs need a GPU"
    assert not any(obstacle(way, "cuda") for way in ways_to_try("cuda"))
    assert tolerance("cpu", "torch.float32") == tolerance("cpu", "torch.float16") == 0
    assert 0 < tolerance("cuda", "torch.float32") < tolerance("cuda", "torch.float16") < 0.01
