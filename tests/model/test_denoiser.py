"""The engine with one job against diffusers' own pipelines: the same seed gives the same picture, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stable_diffusion.core.errors import InvalidRequest
from stable_diffusion.core.schedulers import SCHEDULERS, has_eta, unet_calls_of_a_step
from stable_diffusion.core.telemetry import StepRecord
from stable_diffusion.core.types import Task
from stable_diffusion.engine.copies import AsynchronousCopies
from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.engine import Engine
from stable_diffusion.engine.job import Job, Latents
from stable_diffusion.engine.loading import Parts, load
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from tests.model.recording_engine import RecordingEngine
from tests.model.reference import PIPELINES, assert_same_picture, draw_with_diffusers
from tests.tasks import make_task, task_of_kind


def stop_guidance_after(step: int) -> Callable[..., dict[str, Any]]:
    """diffusers' documented way: a callback at the end of each step that changes the pipeline."""

    def at_step_end(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index + 1 == step:
            pipeline._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    return at_step_end


# Kinds start at other noise levels. Each class is compared in all of them, as are stochastic ones; mere noise levels in one.
SCHEDULERS_AND_KINDS = [
    (scheduler, kind)
    for number, scheduler in enumerate(SCHEDULERS)
    for place, kind in enumerate(PIPELINES)
    if place == number % len(PIPELINES) or scheduler.partition(" ")[2] in ("", "SDE") or scheduler == "DPMSolverMultistepScheduler Karras"
]


@pytest.mark.parametrize(("scheduler", "kind"), SCHEDULERS_AND_KINDS)
def test_one_job_gives_the_picture_of_diffusers(
    recording_engine: RecordingEngine, input_picture: Image.Image, right_half_mask: Image.Image, scheduler: str, kind: str
) -> None:
    task = task_of_kind(input_picture, right_half_mask, kind=kind, scheduler=scheduler, negative_prompt="green", seed=11, strength=0.7)
    (picture,) = recording_engine.draw([task])
    assert_same_picture(picture.image, draw_with_diffusers(DEMO_FOLDER, task))


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0, "scheduler": "EulerDiscreteScheduler"},
        {"width": 96, "height": 72},
        {"scheduler": "DDIMScheduler", "eta": 0.7},
        {"scheduler": "TCDScheduler", "eta": 1.0, "num_inference_steps": 4, "guidance_scale": 1.0},
        {"scheduler": "TCDScheduler", "eta": 0.3, "kind": "inpaint", "strength": 0.7},
        {"scheduler": "LCMScheduler", "num_inference_steps": 4, "guidance_scale": 1.0},
        {"scheduler": "DPMSolverSinglestepScheduler SDE", "num_inference_steps": 7},
        {"num_inference_steps": 50},
        {"prompt": "red circle " * 37 + "red"},
        {"kind": "img2img", "strength": 1.0},
        {"kind": "img2img", "strength": 0.7, "guidance_scale": 1.0},
        {"kind": "inpaint", "strength": 1.0},
        {"kind": "inpaint", "strength": 0.7, "guidance_scale": 1.0, "scheduler": "EulerAncestralDiscreteScheduler"},
    ],
    ids=str,
)
def test_other_settings_give_the_picture_of_diffusers_too(
    recording_engine: RecordingEngine, input_picture: Image.Image, right_half_mask: Image.Image, changes: dict[str, object]
) -> None:
    task = task_of_kind(input_picture, right_half_mask, **changes)
    (picture,) = recording_engine.draw([task])
    assert_same_picture(picture.image, draw_with_diffusers(DEMO_FOLDER, task))


@pytest.mark.parametrize(
    ("kind", "scheduler", "guided", "calls"),
    [
        ("txt2img", "DDIMScheduler", 6, 10),
        ("img2img", "UniPCMultistepScheduler", 5, 8),
        ("txt2img", "HeunDiscreteScheduler", 12, 19),  # two calls a step but for the last one
        ("img2img", "KDPM2AncestralDiscreteScheduler", 10, 15),
    ],
)
def test_guidance_that_ends_early_gives_the_picture_of_diffusers_with_half_the_rows_from_then_on(
    recording_engine: RecordingEngine, input_picture: Image.Image, kind: str, scheduler: str, guided: int, calls: int
) -> None:
    task = make_task(kind=kind, scheduler=scheduler, image=input_picture if kind == "img2img" else None, strength=0.8, guidance_end=0.6)
    task = replace(task, num_inference_steps=10)
    recording_engine.steps.clear()
    (picture,) = recording_engine.draw([task])
    assert [record.rows for record in recording_engine.steps] == [2] * guided + [1] * (calls - guided)
    theirs = draw_with_diffusers(
        DEMO_FOLDER, task, callback_on_step_end=stop_guidance_after(guided), callback_on_step_end_tensor_inputs=["prompt_embeds"]
    )
    assert_same_picture(picture.image, theirs)


def test_guidance_that_ends_at_once_is_no_guidance(recording_engine: RecordingEngine) -> None:
    never, off = recording_engine.draw([make_task(guidance_end=0.0), make_task(guidance_scale=1.0)])
    assert_same_picture(never.image, off.image)


@pytest.mark.parametrize(("scheduler", "kind"), SCHEDULERS_AND_KINDS)
def test_no_step_looks_at_a_value_on_the_device(
    demo_parts: Parts, input_picture: Image.Image, right_half_mask: Image.Image, scheduler: str, kind: str
) -> None:
    """Tensors on the "meta" device have no values: whatever looks at one, for which a GPU would have to be waited for, raises."""
    denoiser, job = ready_on_meta_device(demo_parts, make_task(kind=kind, scheduler=scheduler), input_picture, right_half_mask)
    while not job.is_denoised:
        denoiser.advance(job, denoiser.predict([job])[0])
    assert job.tensors is not None
    assert job.tensors.latents.device.type == "meta"


class CopiesThatWait(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of PyTorch
    """Notes copies from the CPU to the "meta" device. Single numbers are handed to kernels and not copied."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []
        self.is_allowed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        made = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        if not self.is_allowed and any(one.is_meta for one in made) and any(one.device.type == "cpu" and one.dim() for one in given):
            self.found.append(str(func))
        return result

    def copy(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Takes the place of a copy that does not wait."""
        assert tensor.device.type == "cpu"
        self.is_allowed = True
        copied = tensor.to(device)
        self.is_allowed = False
        return copied


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize(("scheduler", "kind"), SCHEDULERS_AND_KINDS)
def test_no_copy_to_the_device_is_waited_for(
    demo_parts: Parts, input_picture: Image.Image, right_half_mask: Image.Image, scheduler: str, kind: str, eta: float
) -> None:
    if eta and not has_eta(scheduler):
        return
    task = make_task(kind=kind, scheduler=scheduler, eta=eta)
    denoiser, job = ready_on_meta_device(demo_parts, task, input_picture, right_half_mask)
    with CopiesThatWait() as copies:
        denoiser.copies = lambda: AsynchronousCopies("meta", copies.copy)
        while not job.is_denoised:
            denoiser.unet_inputs([job])
            # The predicted noise is not computed: that is the same for all.
            denoiser.advance(job, torch.empty(job.rows, 4, 8, 8, device="meta"))
    assert copies.found == []


def ready_on_meta_device(parts: Parts, task: Task, picture: Image.Image, mask: Image.Image) -> tuple[Denoiser, Job]:
    """A job of four steps, whose tensors are moved there before its first step. An image is encoded before that; that may wait."""
    task = replace(task, num_inference_steps=4)
    job = Job(task, on_end=lambda outcome: None)
    ready = Denoiser(parts).prepare(replace(task, image=picture, mask=mask, strength=0.8))
    assert ready.embeddings is not None
    assert ready.embeddings.mask is None
    ready.embeddings = replace(ready.embeddings, tokens=ready.embeddings.tokens.to("meta"))
    for name in ("latents", "unet_timesteps", "inpainting_mask", "image_latents", "noise"):
        tensor = getattr(ready, name)
        setattr(ready, name, tensor if tensor is None else tensor.to("meta"))
    job.tensors = ready
    return Denoiser(on_meta_device(parts)), job


def on_meta_device(parts: Parts) -> Parts:
    """The UNet has the same blocks, with fewer layers: on this device torch computes shapes in Python, slower than it computes values."""
    unet = parts.unet.from_config(parts.unet.config, layers_per_block=1).to("meta")
    return replace(parts, unet=unet, device=torch.device("meta"))


def test_half_precision_starts_from_the_same_noise(demo_parts: Parts) -> None:
    """So a seed means the same image in both services. torch 2.11 drew other numbers in half precision."""
    single = Denoiser(demo_parts).prepare(make_task(scheduler="DDIMScheduler"))
    half = Denoiser(replace(demo_parts, dtype=torch.float16)).prepare(make_task(scheduler="DDIMScheduler"))
    assert half.latents.dtype == torch.float16
    assert torch.equal(half.latents, single.latents.half())


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_can_take_very_few_steps(recording_engine: RecordingEngine, scheduler: str, steps: int) -> None:
    (picture,) = recording_engine.draw([make_task(scheduler=scheduler, num_inference_steps=steps)])
    assert picture.image.size == (64, 64)


def test_what_lcm_cannot_take_is_refused_with_what_it_can(recording_engine: RecordingEngine) -> None:
    told = "num_inference_steps: the noise scheduler LCM does not support a step count of 51 with this model, allowed are 1 to 50"
    with pytest.raises(InvalidRequest, match=told) as caught:
        recording_engine.draw([make_task(scheduler="LCMScheduler", num_inference_steps=51)])
    assert caught.value.problems[0].field == "num_inference_steps"


def test_where_pndm_begins_with_runge_kutta_too_few_steps_are_refused(demo_parts: Parts) -> None:
    """As a model's configuration may ask for; Stable Diffusion's own does not."""
    scheduler = PNDMScheduler.from_config(demo_parts.scheduler.config, skip_prk_steps=False)
    denoiser = Denoiser(replace(demo_parts, scheduler=scheduler))
    with pytest.raises(
        InvalidRequest, match="the noise scheduler PNDM does not support a step count of 1 with this model, allowed are 4 to 150"
    ):
        denoiser.prepare(make_task(num_inference_steps=1))
    assert len(denoiser.prepare(make_task(num_inference_steps=4)).timesteps) == 13


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_calls_that_are_left_are_known_before_the_job_is_prepared(demo_parts: Parts, scheduler: str) -> None:
    """Up to one: PNDM calls once more, and the last step of a second-order method once less."""
    task = make_task(scheduler=scheduler, num_inference_steps=9)
    job = Job(task, on_end=lambda outcome: None)
    expected = job.steps_left
    job.tensors = Denoiser(demo_parts).prepare(task)
    assert abs(job.steps_left - expected) <= 1
    assert job.tensors.scheduler.order == unet_calls_of_a_step(scheduler)
    assert ("eta" in job.tensors.step_arguments) == has_eta(scheduler)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "TCDScheduler"])
def test_the_spacing_of_the_models_configuration_is_kept(demo_parts: Parts, tmp_path: Path, scheduler: str) -> None:
    folder = Path(shutil.copytree(DEMO_FOLDER, tmp_path / "model"))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"timestep_spacing": "trailing"}))
    task = make_task(scheduler=scheduler, num_inference_steps=4)
    engine = RecordingEngine(Engine(lambda: Denoiser(load(check_model(folder), "fp32")), max_batch_size=2), [])
    (picture,) = engine.draw([task])
    engine.engine.close()
    assert_same_picture(picture.image, draw_with_diffusers(folder, task))
    first = Denoiser(replace(demo_parts, scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"))).prepare(task).timesteps[0]
    assert first == 999


def test_the_shared_scheduler_is_never_changed(recording_engine: RecordingEngine, demo_parts: Parts) -> None:
    before = dict(demo_parts.scheduler.config), demo_parts.scheduler.num_inference_steps
    recording_engine.draw([make_task(scheduler="DPMSolverMultistepScheduler Karras"), make_task()])
    assert (dict(demo_parts.scheduler.config), demo_parts.scheduler.num_inference_steps) == before


def test_nothing_is_dropped_up_to_450_tokens(recording_engine: RecordingEngine) -> None:
    words = "a red circle on a blue background"
    long_prompt = words + ", very nice" * 147  # 448 tokens: 3 times 147, and 7
    picture, other = recording_engine.draw([make_task(prompt=long_prompt), make_task(prompt=words, negative_prompt=long_prompt)])
    for one in (picture, other):
        assert (one.dropped_prompt, one.dropped_negative_prompt) == ("", "")
    assert not np.array_equal(np.asarray(picture.image), np.asarray(recording_engine.draw([make_task(prompt=words)])[0].image))


def test_what_does_not_fit_into_450_tokens_is_refused(recording_engine: RecordingEngine) -> None:
    words = "a red circle on a blue background"
    long_prompt = words + ", very nice" * 160
    tasks = {"prompt": make_task(prompt=long_prompt), "negative_prompt": make_task(prompt=words, negative_prompt=long_prompt)}
    for field, task in tasks.items():
        message = f"^{field}: more than 450 tokens; the excess begins with 'very nice"
        with pytest.raises(InvalidRequest, match=message) as caught:
            recording_engine.draw([task])
        assert caught.value.problems[0].field == field
    unguided = make_task(prompt=words, negative_prompt=long_prompt, guidance_scale=1.0)
    assert recording_engine.draw([unguided])[0].dropped_negative_prompt == "", "it is not used"


def test_what_does_not_fit_into_450_tokens_is_reported_where_prompts_are_cut(recording_engine: RecordingEngine) -> None:
    words = "a red circle on a blue background"
    long_prompt = words + ", very nice" * 160
    tasks = [make_task(prompt=long_prompt, cut_prompts=True), make_task(prompt=words, negative_prompt=long_prompt, cut_prompts=True)]
    picture, other = recording_engine.draw(tasks)
    assert picture.dropped_prompt.endswith("very nice")
    assert picture.dropped_negative_prompt == ""
    assert other.dropped_prompt == ""
    assert other.dropped_negative_prompt == picture.dropped_prompt


def as_job(state: Latents) -> Job:
    job = Job(make_task(), on_end=lambda outcome: None)
    job.tensors = state
    return job


def test_a_text_that_was_encoded_before_is_not_encoded_again_and_draws_the_same(demo_parts: Parts) -> None:
    encoded: list[torch.nn.Module] = []
    hook = demo_parts.text_encoders[0].model.register_forward_hook(lambda module, inputs, output: encoded.append(module))
    denoiser = Denoiser(demo_parts)
    first = denoiser.prepare(make_task(prompt="a red circle"))
    assert len(encoded) == 2  # and the empty negative prompt
    second = denoiser.prepare(make_task(prompt="a red circle", seed=2))
    assert len(encoded) == 2
    denoiser.prepare(make_task(prompt="a blue circle"))
    assert len(encoded) == 3
    hook.remove()
    again = Denoiser(demo_parts)
    embeddings = [
        one.unet_inputs([as_job(state)]).embeddings
        for one, state in ((denoiser, first), (denoiser, second), (again, again.prepare(make_task(prompt="a red circle"))))
    ]
    assert torch.equal(embeddings[0], embeddings[1])
    assert torch.equal(embeddings[0], embeddings[2])


def test_a_step_is_timed_on_the_real_model_and_changes_nothing(demo_parts: Parts) -> None:
    denoiser = Denoiser(demo_parts)
    state = torch.random.get_rng_state()
    seconds = denoiser.step_seconds(2, 64, 64)
    assert seconds is not None
    assert 0.001 < seconds < 30
    assert torch.equal(torch.random.get_rng_state(), state)


def test_jobs_that_do_not_fit_into_memory_have_no_step_time(demo_parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = Denoiser(demo_parts)

    def full(jobs: object) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(denoiser, "predict", full)
    assert denoiser.step_seconds(2, 64, 64) is None


@pytest.fixture(scope="module")
def inpainting_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a UNet of 9 input channels and random weights, as models made for inpainting have."""
    folder = tmp_path_factory.mktemp("inpainting")
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO_FOLDER, dtype=torch.float32)
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(pipeline.unet.config, in_channels=9)
    StableDiffusionInpaintPipeline(**(pipeline.components | {"unet": unet}), requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_model_made_for_inpainting_gives_the_picture_of_diffusers(
    inpainting_folder: Path, input_picture: Image.Image, right_half_mask: Image.Image, strength: float
) -> None:
    model = check_model(inpainting_folder)
    assert model.only_inpaints
    engine = RecordingEngine(Engine(lambda: Denoiser(load(model, "fp32")), max_batch_size=2), [])
    task = make_task(kind="inpaint", image=input_picture, mask=right_half_mask, strength=strength)
    (picture,) = engine.draw([task])
    engine.engine.close()
    assert_same_picture(picture.image, draw_with_diffusers(inpainting_folder, task))


@pytest.fixture(scope="module")
def lcm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a UNet that takes the guidance scale as an input and has random weights, as diffusers saves such models."""
    folder = tmp_path_factory.mktemp("lcm")
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO_FOLDER, dtype=torch.float32)
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(pipeline.unet.config, time_cond_proj_dim=32)
    scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    components = pipeline.components | {"unet": unet, "scheduler": scheduler}
    LatentConsistencyModelPipeline(**components, requires_safety_checker=False).save_pretrained(folder)
    return folder


def test_a_model_that_takes_the_guidance_scale_as_an_input_gives_the_picture_of_diffusers_with_one_row(lcm_folder: Path) -> None:
    model = check_model(lcm_folder)
    assert (model.scheduler, model.defaults.num_inference_steps, model.defaults.guidance_scale) == ("LCMScheduler", 4, 8.5)
    steps: list[StepRecord] = []
    engine = RecordingEngine(Engine(lambda: Denoiser(load(model, "fp32")), max_batch_size=3, on_step=steps.append), steps)
    tasks = [
        make_task(scheduler=model.scheduler, num_inference_steps=count, guidance_scale=scale, seed=seed)
        for count, scale, seed in ((4, 8.5, 1), (4, 1.5, 1), (6, 3.0, 2))
    ]
    alone = [engine.draw([task])[0] for task in tasks]
    assert {record.rows for record in steps} == {1}
    together = engine.draw(tasks)
    assert max(record.rows for record in steps) == 3
    engine.engine.close()
    pipeline = LatentConsistencyModelPipeline.from_pretrained(lcm_folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for task, one, other in zip(tasks, alone, together, strict=True):
        theirs = pipeline(
            prompt=task.prompt,
            width=task.width,
            height=task.height,
            num_inference_steps=task.num_inference_steps,
            guidance_scale=task.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(task.seed),
        ).images[0]
        assert_same_picture(one.image, theirs)
        assert np.ptp(np.asarray(one.image).astype(int) - np.asarray(other.image)) <= 2
    assert not np.array_equal(np.asarray(alone[0].image), np.asarray(alone[1].image)), "the scale has no effect"
