"""Stable Diffusion XL against diffusers' own pipelines, on a tiny model with random weights: the same pictures, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from stable_diffusion.core.errors import ModelFolderError
from stable_diffusion.core.schedulers import SCHEDULERS
from stable_diffusion.core.telemetry import OutOfMemoryRecord, Record, StepRecord
from stable_diffusion.core.types import LoraChoice, Task
from stable_diffusion.engine import loading
from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.engine import Engine
from stable_diffusion.engine.job import Job
from stable_diffusion.engine.loading import Parts, load
from stable_diffusion.engine.row_inputs import joined
from stable_diffusion.engine.ways import Way
from stable_diffusion.models.folder import check_model
from stable_diffusion.models.loras import LoraFolder
from tests.lora_files import changes, save_as_diffusers, save_as_kohya
from tests.model.recording_engine import RecordingEngine
from tests.model.reference import PIPELINES, assert_same_picture, draw_with_diffusers, largest_difference, mean_difference
from tests.model.tiny_models import write_tiny_xl
from tests.tasks import make_task, task_of_kind

SCHEDULER = "EulerDiscreteScheduler"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_xl(tmp_path_factory.mktemp("xl") / "tiny-xl")


@pytest.fixture(scope="module")
def parts(folder: Path) -> Parts:
    return load(check_model(folder), "fp32")


@pytest.fixture(scope="module")
def engine(parts: Parts) -> Iterator[RecordingEngine]:
    steps: list[StepRecord] = []
    engine = Engine(lambda: Denoiser(parts), max_batch_size=10, on_step=steps.append)
    yield RecordingEngine(engine, steps)
    engine.close()


# Each scheduler in one kind, in turn.
SCHEDULERS_AND_KINDS = [(scheduler, list(PIPELINES)[number % len(PIPELINES)]) for number, scheduler in enumerate(SCHEDULERS)]


@pytest.mark.parametrize(("scheduler", "kind"), SCHEDULERS_AND_KINDS)
def test_one_job_gives_the_picture_of_diffusers(
    engine: RecordingEngine, folder: Path, input_picture: Image.Image, right_half_mask: Image.Image, scheduler: str, kind: str
) -> None:
    task = task_of_kind(input_picture, right_half_mask, kind=kind, scheduler=scheduler, negative_prompt="green", seed=11, strength=0.7)
    (picture,) = engine.draw([task])
    assert_same_picture(picture.image, draw_with_diffusers(folder, task))


@pytest.mark.parametrize(
    "changes",
    [
        {},  # no negative prompt: zeros
        {"guidance_scale": 1.0},
        {"prompt": "a red circle!!! wow! on blue"},  # the padding of the second text encoder's texts
        {"width": 96, "height": 72},
        {"width": 72, "height": 136, "negative_prompt": "a square"},
        {"kind": "img2img", "strength": 1.0},
        {"kind": "inpaint", "strength": 1.0},
    ],
    ids=str,
)
def test_other_settings_give_the_picture_of_diffusers_too(
    engine: RecordingEngine, folder: Path, input_picture: Image.Image, right_half_mask: Image.Image, changes: dict[str, object]
) -> None:
    task = task_of_kind(input_picture, right_half_mask, **{"scheduler": SCHEDULER, **changes})
    (picture,) = engine.draw([task])
    assert_same_picture(picture.image, draw_with_diffusers(folder, task))


def test_each_input_changes_the_picture(engine: RecordingEngine, parts: Parts) -> None:
    task = make_task(scheduler=SCHEDULER)
    others = [replace(task, prompt="a green square"), replace(task, negative_prompt="green"), replace(task, seed=2)]
    (picture,) = engine.draw([task])
    for other in engine.draw(others):
        assert largest_difference(picture.image, other.image) > 1
    denoiser = Denoiser(parts)
    job = Job(task, on_end=lambda outcome: None)
    job.tensors = denoiser.prepare(task)
    inputs = denoiser.unet_inputs([job])
    assert inputs.pooled is not None
    assert inputs.time_ids is not None
    predicted = denoiser.call_unet(inputs)
    assert not torch.equal(predicted, denoiser.call_unet(replace(inputs, pooled=inputs.pooled + 1)))
    assert not torch.equal(predicted, denoiser.call_unet(replace(inputs, time_ids=inputs.time_ids + 100)))


def test_a_model_made_for_the_empty_text_gets_its_embeddings(tmp_path: Path) -> None:
    folder = write_tiny_xl(tmp_path / "xl", force_zeros_for_empty_prompt=False)
    task = make_task(scheduler=SCHEDULER)
    parts = load(check_model(folder), "fp32")
    assert not parts.zeros_for_no_negative_prompt
    assert_same_picture(image_of(parts, task), draw_with_diffusers(folder, task))


@pytest.mark.parametrize("strength", [0.7, 1.0])
def test_a_model_that_only_inpaints_gives_the_picture_of_diffusers(
    tmp_path: Path, input_picture: Image.Image, right_half_mask: Image.Image, strength: float
) -> None:
    folder = write_tiny_xl(tmp_path / "xl", in_channels=9)
    model = check_model(folder)
    assert model.only_inpaints
    task = make_task(
        kind="inpaint", scheduler=SCHEDULER, image=input_picture, mask=right_half_mask, strength=strength, negative_prompt="green"
    )
    assert_same_picture(image_of(load(model, "fp32"), task), draw_with_diffusers(folder, task))


def test_jobs_of_every_kind_share_every_step_and_are_within_two_levels_of_alone(
    engine: RecordingEngine, input_picture: Image.Image, right_half_mask: Image.Image
) -> None:
    tasks = [
        make_task(scheduler=SCHEDULER, prompt="a red circle " * (12 * number + 1), seed=number, negative_prompt="green" * (number % 2))
        for number in range(4)
    ]
    tasks.append(make_task(scheduler="DDIMScheduler", kind="img2img", image=input_picture, strength=0.9, guidance_scale=1.0))
    tasks.append(make_task(scheduler="LCMScheduler", kind="inpaint", image=input_picture, mask=right_half_mask, clip_skip=2))
    tasks.append(make_task(prompt="(a red circle:1.4) AND a [blue|green] square", prompt_syntax="a1111", parts=2, scheduler=SCHEDULER))
    alone = [engine.draw([task])[0].image for task in tasks]
    engine.steps.clear()
    together = engine.draw(tasks)
    assert max(len(step.job_numbers) for step in engine.steps) == len(tasks)
    assert max(largest_difference(one, other.image) for one, other in zip(alone, together, strict=True)) <= 2


def test_rows_of_one_call_have_their_own_sizes(parts: Parts) -> None:
    """Each row of a call with different `time_ids` is what it is alone; the engine's jobs of one call have equal ones."""
    denoiser = Denoiser(parts)
    jobs = [Job(make_task(seed=seed, guidance_scale=1.0), on_end=lambda outcome: None) for seed in range(3)]
    for job in jobs:
        job.tensors = denoiser.prepare(job.task)
    alone = [denoiser.unet_inputs([job]) for job in jobs]
    sizes = [torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0 * number]]) for number in range(1, 4)]
    alone = [replace(one, time_ids=size) for one, size in zip(alone, sizes, strict=True)]
    together = denoiser.call_unet(joined(alone))
    for row, one in zip(torch.split(together, 1), alone, strict=True):
        assert torch.allclose(row, denoiser.call_unet(one), atol=1e-5)


def test_a_text_that_fills_more_chunks_for_one_text_encoder_is_encoded_for_both(engine: RecordingEngine) -> None:
    (plain, emphatic) = engine.draw([make_task(scheduler=SCHEDULER, prompt=f"a red circle{end}") for end in ("", "!!!" * 40)])
    assert largest_difference(plain.image, emphatic.image) > 0


def test_clip_skip_gives_the_picture_of_diffusers(engine: RecordingEngine, folder: Path) -> None:
    task = make_task(scheduler=SCHEDULER, clip_skip=2, guidance_scale=1.0)
    (picture,) = engine.draw([task])
    assert largest_difference(picture.image, engine.draw([replace(task, clip_skip=1)])[0].image) > 0
    assert_same_picture(picture.image, draw_with_diffusers(folder, task, clip_skip=1))


def test_a_textual_inversion_of_both_text_encoders_gives_the_picture_of_diffusers(folder: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = {"clip_l": torch.randn(2, 32, generator=generator), "clip_g": torch.randn(2, 48, generator=generator)}
    save_file(vectors, tmp_path / "odd.safetensors")
    parts = load(replace(check_model(folder), embeddings=tmp_path), "fp32")
    task = make_task(scheduler=SCHEDULER, prompt="an odd circle")
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
    for index, (tokenizer, encoder) in enumerate(
        [(pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)]
    ):
        pipeline.load_textual_inversion(vectors[("clip_l", "clip_g")[index]], token="<odd>", text_encoder=encoder, tokenizer=tokenizer)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    (expected,) = pipeline(
        "an <odd> circle",
        num_inference_steps=task.num_inference_steps,
        guidance_scale=task.guidance_scale,
        width=64,
        height=64,
        generator=torch.Generator("cpu").manual_seed(task.seed),
    ).images
    ours = image_of(parts, task)
    assert largest_difference(ours, image_of(parts, replace(task, prompt="an circle"))) > 0
    assert_same_picture(ours, expected)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
@pytest.mark.parametrize("spelling", ["diffusers", "kohya", "original"])
def test_a_lora_of_the_unet_and_both_text_encoders_gives_the_picture_of_diffusers(folder: Path, tmp_path: Path, spelling: str) -> None:
    block = "mid_block.attentions.0.transformer_blocks.1"
    layers = {f"{block}.attn1.to_q": (64, 64), f"{block}.attn2.to_k": (64, 80), f"{block}.ff.net.0.proj": (512, 64)}
    layers |= {"down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_v": (64, 80)}
    layers |= {"up_blocks.0.attentions.2.transformer_blocks.1.attn1.to_out.0": (64, 64)}
    attention = [f"text_model.encoder.layers.1.self_attn.{layer}" for layer in ("q_proj", "out_proj")]
    unet = changes(layers, seed=1, size=0.3)
    first, second = (
        changes(dict.fromkeys(attention, (32, 32)), seed=2, size=0.5),
        changes(dict.fromkeys(attention, (48, 48)), seed=3, size=0.5),
    )
    if spelling == "diffusers":
        save_as_diffusers(tmp_path / "one.safetensors", unet, first, second)
    else:
        original = {
            "mid_block.attentions.0": "middle_block.1",
            "down_blocks.1.attentions.1": "input_blocks.5.1",
            "up_blocks.0.attentions.2": "output_blocks.2.1",
        }
        for ours, theirs in original.items() if spelling == "original" else ():
            unet = {name.replace(ours, theirs): factors for name, factors in unet.items()}
        save_as_kohya(tmp_path / "one.safetensors", unet, first, second)
    model = replace(check_model(folder), loras=tmp_path)
    loras = LoraFolder(tmp_path, model).look()
    assert loras.refused == {}
    file = loras.files["one"]
    choice = LoraChoice("one", 0.8, 0.8, file.hash, file.size_bytes)
    task = make_task(scheduler=SCHEDULER, loras=(choice,))
    parts = load(model, "fp32")
    image = image_of(parts, task)
    assert largest_difference(image, image_of(parts, replace(task, loras=(choice._replace(text_encoder_weight=0.0),)))) > 0
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(tmp_path / "one.safetensors", adapter_name="one")
    pipeline.set_adapters(["one"], [0.8])
    (expected,) = pipeline(
        task.prompt,
        num_inference_steps=task.num_inference_steps,
        guidance_scale=task.guidance_scale,
        width=64,
        height=64,
        generator=torch.Generator("cpu").manual_seed(task.seed),
    ).images
    assert_same_picture(image, expected)


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")  # diffusers itself calls it
def test_in_half_precision_the_autoencoder_computes_in_float32_as_in_diffusers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, input_picture: Image.Image
) -> None:
    monkeypatch.setattr(loading, "placement", lambda precision: (torch.device("cpu"), torch.float16))
    parts = load(check_model(folder), "fp16")
    assert (parts.unet.dtype, parts.vae.dtype) == (torch.float16, torch.float32)
    task = make_task(scheduler=SCHEDULER, kind="img2img", image=input_picture, strength=0.7, num_inference_steps=4)
    job = Job(task, on_end=lambda outcome: None)
    denoiser = Denoiser(parts)
    job.tensors = denoiser.prepare(task)
    while not job.is_denoised:
        denoiser.advance(job, denoiser.predict([job])[0])
    picture = denoiser.decode(job)
    assert (picture.dtype, picture.decoded_again) == ("float16", False)
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(folder, dtype=torch.float16)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    (expected,) = pipeline(
        task.prompt,
        image=input_picture,
        strength=task.strength,
        num_inference_steps=task.num_inference_steps,
        guidance_scale=task.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(task.seed),
    ).images
    assert_same_picture(picture.image, expected)


def test_recorded_calls_replay_all_inputs(parts: Parts) -> None:
    replays: list[int] = []

    def record(work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        result = work()

        def replay() -> None:
            replays.append(1)
            result.copy_(work())

        return replay, result

    denoiser, plain = Denoiser(parts, lambda: record), Denoiser(parts)
    assert denoiser.use(Way(graphs=True), 64, 64, [1, 2]) == 4
    for number, prompt in enumerate(("a red circle", "a blue square")):
        job = Job(make_task(prompt=prompt, seed=number), on_end=lambda outcome: None)
        job.tensors = denoiser.prepare(job.task)
        inputs = denoiser.unet_inputs([job])
        with torch.inference_mode():
            assert torch.equal(denoiser.call_unet(inputs), plain.call_unet(inputs))
    assert len(replays) == 2


@pytest.mark.parametrize("kind", ["txt2img", "img2img"])
def test_an_image_whose_autoencoder_runs_out_of_memory_is_decoded_in_tiles_and_says_so(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """There is memory for 512x512, not for more."""
    records: list[Record] = []
    engine = Engine(lambda: Denoiser(parts), max_batch_size=1, on_record=records.append)
    drawing = RecordingEngine(engine, [])
    side = 640
    picture = Image.radial_gradient("L").resize((side, side)).convert("RGB")
    inputs = {} if kind == "txt2img" else {"image": picture, "strength": 0.5}
    task = make_task(kind=kind, width=side, height=side, num_inference_steps=2, scheduler=SCHEDULER, guidance_scale=1.0, **inputs)
    (whole,) = drawing.draw([task])
    for part, largest in ((parts.vae.decoder, 64), (parts.vae.encoder, 512)):
        monkeypatch.setattr(part, "forward", _raising_beyond(largest, part.forward))
    (tiled,) = drawing.draw([task])
    engine.close()
    assert (whole.tiled, tiled.tiled) == (False, True)
    assert OutOfMemoryRecord() in records
    assert not parts.vae.use_tiling
    assert 0 < mean_difference(whole.image, tiled.image) < 10


def _raising_beyond(largest: int, forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def raising(tensor: torch.Tensor) -> torch.Tensor:
        if max(tensor.shape[-2:]) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(tensor)

    return raising


def test_a_folder_is_described_by_its_json_files(folder: Path, tmp_path: Path) -> None:
    model = check_model(folder)
    assert (model.is_xl, model.only_inpaints, model.has_safety_checker, model.scheduler) == (True, False, False, "EulerDiscreteScheduler")
    assert (model.native_width, model.max_side, model.text_layers) == (64, 1024, 2)
    assert (model.defaults.num_inference_steps, model.defaults.guidance_scale) == (50, 5.0)
    large = check_model(write_tiny_xl(tmp_path / "large", sample_size=128))
    assert (large.native_width, large.max_side, large.max_pixel_steps) == (1024, 2048, 1_600_000_000)
    assert large.hash == model.hash, "the weights and the scheduler are the same"


def test_every_component_of_a_folder_is_checked_and_part_of_its_hash(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    weights = copy / "text_encoder_2" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights)
    assert check_model(copy).hash != check_model(folder).hash
    (copy / "tokenizer_2" / "tokenizer.json").unlink()
    with pytest.raises(ModelFolderError, match="tokenizer_2"):
        check_model(copy)
    weights.unlink()
    with pytest.raises(ModelFolderError, match="text_encoder_2/model.safetensors: missing"):
        check_model(copy)


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("model_index.json", {"requires_aesthetics_score": True}, "the refiner of Stable Diffusion XL cannot generate images on its own"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "latents_mean and latents_std are not supported"),
    ],
)
def test_models_that_need_more_are_refused_by_name(folder: Path, tmp_path: Path, file: str, change: dict[str, object], told: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | change))
    with pytest.raises(ModelFolderError, match=told):
        check_model(copy)


def image_of(parts: Parts, task: Task) -> Image.Image:
    engine = Engine(lambda: Denoiser(parts), max_batch_size=1)
    image: Image.Image = RecordingEngine(engine, []).draw([task])[0].image
    engine.close()
    return image
