"""Models in one file: every weight and every picture is the one that the same model has as a folder, and as diffusers loads the file."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_unet_diffusers_config_from_ldm, create_vae_diffusers_config_from_ldm
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from stable_diffusion.core.errors import ModelFolderError
from stable_diffusion.core.types import Precision
from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.engine import Engine
from stable_diffusion.engine.loading import load, pipeline_of, shipped_tokenizers
from stable_diffusion.engine.prediction_type import prediction_type_of
from stable_diffusion.models.folder import DEMO_FOLDER, DEMO_XL_FOLDER, ModelFolder, check_model
from stable_diffusion.models.single_file import KINDS, KINDS_FOLDER, Kind
from tests.checkpoints import Tiny, checkpoint_tensors, make_tiny, modules_of, training_tensors, vae_tensors, write_checkpoint
from tests.model.recording_engine import RecordingEngine
from tests.model.reference import PIPELINES, XL_PIPELINES, assert_same_picture, draw_with_diffusers
from tests.tasks import make_task
from tests.tensor_files import write

FAMILIES = [("sd1", 4), ("sd1", 9), ("sd2", 4), ("sd2", 9), ("sdxl", 4), ("sdxl", 9)]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Nothing is fetched: a connection would fail here, and the test with it even if somebody caught that."""
    tried: list[Any] = []

    def refuse(_: socket.socket, address: Any) -> None:
        tried.append(address)
        raise OSError("this test has no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **_: refuse(None, arguments))  # type: ignore[arg-type]
    yield tried
    assert tried == []


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: f"{family[0]}-{family[1]}")
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    family, channels = request.param
    return make_tiny(family, tmp_path_factory.mktemp(f"{family}-{channels}"), channels=channels)


def assert_same_weights(loaded: Any, expected: Any, dtype: torch.dtype) -> None:
    """Bit for bit, with the rounding to `dtype` that the file has."""
    theirs = dict(modules_of(expected))
    for component, module in modules_of(loaded):
        weights = module.state_dict()
        assert weights.keys() == theirs[component].state_dict().keys()
        for name, tensor in theirs[component].state_dict().items():
            assert weights[name].device.type == "cpu", name
            assert weights[name].dtype == torch.float32, name
            assert torch.equal(weights[name], tensor.to(dtype).float()), f"{component} {name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("with_training", [False, True])
def test_every_weight_of_a_file_is_loaded_bit_for_bit(tiny: Tiny, tmp_path: Path, dtype: torch.dtype, with_training: bool) -> None:
    tensors = checkpoint_tensors(tiny.pipeline)
    file = write_checkpoint(tmp_path / "x.safetensors", tensors | (training_tensors(tensors) if with_training else {}), dtype)
    model = check_model(file, kinds=[tiny.kind])
    assert_same_weights(pipeline_of(model, torch.float32), tiny.pipeline, dtype)


def test_a_file_has_the_hash_and_the_shapes_of_its_folder(tiny: Tiny, tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path / "x.safetensors", checkpoint_tensors(tiny.pipeline))
    model = check_model(file, kinds=[tiny.kind])
    theirs = ModelFolder(**{**vars(model), "path": tiny.folder, "file": None})
    for component, module in modules_of(tiny.pipeline):
        assert model.weight_shapes(component) == {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
        assert model.weight_shapes(component) == theirs.weight_shapes(component)
    assert model.hash == theirs.hash
    other = write_checkpoint(tmp_path / "y.safetensors", checkpoint_tensors(tiny.pipeline), torch.float16)
    assert check_model(other, kinds=[tiny.kind]).hash != model.hash


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_gives_the_picture_of_diffusers_own_loader(
    tiny: Tiny, tmp_path: Path, dtype: torch.dtype, input_picture: Image.Image, right_half_mask: Image.Image
) -> None:
    tensors = checkpoint_tensors(tiny.pipeline)
    file = write_checkpoint(tmp_path / "x.safetensors", tensors | training_tensors(tensors), dtype)
    model = check_model(file, kinds=[tiny.kind])
    inpainting: dict[str, Any] = {"image": input_picture, "mask": right_half_mask} if model.only_inpaints else {}
    task = make_task(kind="inpaint" if model.only_inpaints else "txt2img", scheduler=model.scheduler, strength=1.0, **inpainting)
    engine = RecordingEngine(Engine(lambda: Denoiser(load(model, "fp32")), max_batch_size=2), [])
    (picture,) = engine.draw([task])
    engine.engine.close()
    pipeline_class = (XL_PIPELINES if model.is_xl else PIPELINES)[task.kind]
    pipeline = pipeline_class.from_single_file(str(file), config=str(tiny.kind.folder), dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt=task.prompt,
        negative_prompt=task.negative_prompt or None,
        num_inference_steps=task.num_inference_steps,
        guidance_scale=task.guidance_scale,
        width=task.width,
        height=task.height,
        generator=torch.Generator("cpu").manual_seed(task.seed),
        **({"image": task.image, "mask_image": task.mask, "strength": 1.0} if model.only_inpaints else {}),
    ).images[0]
    assert_same_picture(picture.image, theirs)
    assert len(np.unique(np.asarray(theirs))) > 20


@pytest.fixture(scope="module")
def demo_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO_FOLDER, dtype=torch.float16)
    return write_checkpoint(tmp_path_factory.mktemp("demo") / "shapes.safetensors", checkpoint_tensors(pipeline))


def test_the_demo_model_in_one_file_gives_its_pictures(demo_file: Path) -> None:
    model = check_model(demo_file)
    assert (model.name, model.file, model.path, model.native_width) == ("shapes", demo_file, DEMO_FOLDER, 64)
    engine = RecordingEngine(Engine(lambda: Denoiser(load(model, "fp32")), max_batch_size=2), [])
    task = make_task()
    (picture,) = engine.draw([task])
    engine.engine.close()
    assert_same_picture(picture.image, draw_with_diffusers(DEMO_FOLDER, task))


def test_the_demo_xl_model_in_one_file_gives_its_pictures_and_has_its_hash(tmp_path: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(DEMO_XL_FOLDER, dtype=torch.float16)
    model = check_model(write_checkpoint(tmp_path / "shapes-xl.safetensors", checkpoint_tensors(pipeline)))
    assert (model.is_xl, model.path, model.hash) == (True, DEMO_XL_FOLDER, check_model(DEMO_XL_FOLDER).hash)
    engine = RecordingEngine(Engine(lambda: Denoiser(load(model, "fp32")), max_batch_size=2), [])
    task = make_task(prompt="a red circle!", negative_prompt="green", scheduler="EulerDiscreteScheduler")
    (picture,) = engine.draw([task])
    engine.engine.close()
    assert_same_picture(picture.image, draw_with_diffusers(DEMO_XL_FOLDER, task))


def test_a_file_of_the_demo_model_has_the_hash_of_its_folder(demo_file: Path) -> None:
    assert check_model(demo_file).hash == check_model(DEMO_FOLDER).hash


# What was published in the training configurations (v1-inference.yaml, v2-inference-v.yaml, sd_xl_base.yaml) and by latent-diffusion.
_AUTOENCODER = {"in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 4, "resolution": 256}
_SD1 = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "transformer_depth": 1,
    "context_dim": 768,
}
_SD2 = {
    **{name: _SD1[name] for name in _SD1 if name != "num_heads"},
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "context_dim": 1024,
}
_SDXL = {
    **_SD2,
    "attention_resolutions": [4, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [1, 2, 10],
    "context_dim": 2048,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
_PUBLISHED = {
    "sd1": (_SD1, 0.18215),
    "sd1-inpainting": (_SD1 | {"in_channels": 9}, 0.18215),
    "sd2": (_SD2, 0.18215),
    "sd2-base": (_SD2, 0.18215),
    "sd2-inpainting": (_SD2 | {"in_channels": 9}, 0.18215),
    "sdxl": (_SDXL, 0.13025),
    "sdxl-inpainting": (_SDXL | {"in_channels": 9}, 0.13025),
}
SHIPPED = [kind for kind in KINDS if kind.folder.parent == KINDS_FOLDER]


@pytest.mark.parametrize("kind", SHIPPED, ids=lambda kind: kind.folder.name)
def test_the_shipped_configuration_is_what_diffusers_makes_of_the_published_one(kind: Kind) -> None:
    unet, scaling = _PUBLISHED[kind.folder.name]
    params: dict[str, Any] = {"first_stage_config": {"params": {"ddconfig": _AUTOENCODER}}, "unet_config": {"params": unet}}
    published = {"model": {"params": params | {"network_config": params["unet_config"]}}}
    size = {"sd2": 96, "sdxl": 128, "sdxl-inpainting": 128}.get(kind.folder.name, 64)
    shipped = kind.config("unet")
    theirs = create_unet_diffusers_config_from_ldm(published, checkpoint={}, image_size=None)
    for name in set(theirs) - {"sample_size", "upcast_attention"}:
        assert _of_unet(shipped, name) == _of_unet(theirs, name), name
    assert shipped["sample_size"] == size
    vae = kind.config("vae")
    for name, value in create_vae_diffusers_config_from_ldm(published, checkpoint={}, scaling_factor=scaling).items():
        if name != "sample_size":
            assert _plain(vae.get(name)) == _plain(value), name


def _of_unet(config: dict[str, Any], name: str) -> Any:
    defaults = inspect.signature(UNet2DConditionModel.__init__).parameters
    return _plain(config.get(name, defaults[name].default))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("kind", SHIPPED, ids=lambda kind: kind.folder.name)
def test_a_file_of_full_size_is_of_its_kind(kind: Kind, tmp_path: Path) -> None:
    """Names and shapes as diffusers' and transformers' own models have them, without values."""
    pipeline = SimpleNamespace(text_encoder_2=None)
    with torch.device("meta"):
        pipeline.unet = UNet2DConditionModel.from_config(kind.config("unet"))
        pipeline.vae = AutoencoderKL.from_config(kind.config("vae"))
        pipeline.text_encoder = CLIPTextModel(CLIPTextConfig(**kind.config("text_encoder")))
        if kind.folder.name.startswith("sdxl"):
            pipeline.text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**kind.config("text_encoder_2")))
    tensors = checkpoint_tensors(pipeline)
    file = write(tmp_path / "x.safetensors", {name: tuple(tensor.shape) for name, tensor in tensors.items()}, dtype="F16")
    model = check_model(file)
    is_base = kind.folder.name == "sd2-base"
    assert model.path == (kind.folder.with_name("sd2") if is_base else kind.folder)
    assert model.only_inpaints == kind.folder.name.endswith("inpainting")
    assert model.is_xl == kind.folder.name.startswith("sdxl")
    for component, module in modules_of(pipeline):
        assert model.weight_shapes(component) == {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    # In thousand millions, as published: UNet, autoencoder and text encoders together.
    assert round(sum(tensor.numel() for tensor in tensors.values()) / 1e9, 1) == {"sd1": 1.1, "sd2": 1.3, "sdx": 3.5}[kind.folder.name[:3]]


TEXTS = [
    "a photo of an astronaut riding a horse on mars, (highly detailed:1.2)",
    "It's 2024 & they're café-ing, naïve! 你好 мир 🦄 e=mc² x_y don't",
    "  UPPER   lower\tTab\nline #hashtag @name 3.14159 <lora:x:1> [a|b]",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_shipped_vocabulary_gives_clips_tokens(text: str) -> None:
    tokenizers = shipped_tokenizers(KINDS[0].folder, is_xl=False)
    assert tokenizers.keys() == {"tokenizer"}
    instant_clip_tokenizer = pytest.importorskip("instant_clip_tokenizer", reason="it has no wheel for Python 3.13")
    tokens = tokenizers["tokenizer"](text, add_special_tokens=False).input_ids
    assert tokens == instant_clip_tokenizer.Tokenizer().encode(text)


def test_texts_are_begun_ended_and_padded_as_each_kind_does() -> None:
    def tokens(kind: str, name: str = "tokenizer") -> list[int]:
        found = shipped_tokenizers(KINDS_FOLDER / kind, is_xl=kind.startswith("sdxl"))[name]
        assert found.model_max_length == 77
        ids: list[int] = found("a horse", padding="max_length", max_length=6).input_ids
        return ids

    assert tokens("sd1") == tokens("sdxl") == [49406, 320, 4558, 49407, 49407, 49407]
    assert tokens("sd2") == tokens("sdxl", "tokenizer_2") == [49406, 320, 4558, 49407, 0, 0]


class PredictsV:
    """What the demo model would predict if it had been trained for v: the same knowledge in the other form."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self.config, self.device, self.dtype = pipeline.unet.config, pipeline.unet.device, pipeline.unet.dtype

    def __call__(self, noisy: torch.Tensor, timestep: int, encoder_hidden_states: torch.Tensor) -> SimpleNamespace:
        noise = self._pipeline.unet(noisy, timestep, encoder_hidden_states=encoder_hidden_states).sample
        kept = self._pipeline.scheduler.alphas_cumprod[timestep]
        image = (noisy - (1 - kept).sqrt() * noise) / kept.sqrt()
        return SimpleNamespace(sample=kept.sqrt() * noise - (1 - kept).sqrt() * image)


def test_a_probe_shows_what_the_unet_predicts() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO_FOLDER, dtype=torch.float32)
    others = (pipeline.text_encoder, pipeline.tokenizer)
    assert prediction_type_of(pipeline.unet, *others) == "epsilon"
    assert prediction_type_of(PredictsV(pipeline), *others) == "v_prediction"


def test_a_file_that_could_be_of_both_types_is_probed_unless_the_operator_says_which(
    demo_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Path(shutil.copytree(DEMO_FOLDER, tmp_path / "v", ignore=shutil.ignore_patterns("*.safetensors")))
    scheduler = other / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    kinds = [Kind("for v", other), KINDS[-1]]
    file = Path(shutil.copy(demo_file, tmp_path / "shapes.safetensors"))
    model = check_model(file, kinds=kinds)
    assert (model.is_prediction_type_unknown, model.path) == (True, other)
    with caplog.at_level(logging.INFO, logger="stable_diffusion"):
        assert load(model, "fp32").scheduler.config.prediction_type == "epsilon"
    [told] = [message for message in caplog.messages if "a test of the UNet" in message]
    assert (
        told
        == 'shapes: a test of the UNet shows "prediction_type": "epsilon". The native size is 64x64 unless shapes.defaults.json says more.'
    )
    (tmp_path / "shapes.defaults.json").write_text('{"prediction_type": "v_prediction"}')
    said = check_model(file, kinds=kinds)
    assert not said.is_prediction_type_unknown
    assert load(said, "fp32").scheduler.config.prediction_type == "v_prediction"
    (tmp_path / "shapes.defaults.json").write_text('{"prediction_type": "epsilon"}')
    assert check_model(file, kinds=kinds).path == DEMO_FOLDER


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_half_precision_file_is_computed_in_float32_in_both_services(demo_file: Path, precision: Precision) -> None:
    parts = load(check_model(demo_file), precision)
    assert {tensor.dtype for module in (parts.unet, parts.vae, parts.text_encoders[0].model) for tensor in module.parameters()} == {
        torch.float32
    }


_OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def spelled(vae: Any, spelling: str) -> dict[str, torch.Tensor]:
    """An autoencoder alone, as it is published."""
    if spelling == "of a checkpoint":
        return vae_tensors(vae) | {"first_stage_model.loss.logvar": torch.ones(1)}
    if spelling == "alone":
        return vae_tensors(vae, prefix="") | {"loss.logvar": torch.ones(1), "model_ema.decay": torch.ones(1)}
    found = dict(vae.state_dict())
    if spelling == "diffusers before 0.17":
        for now, before in _OLD_NAMES.items():
            found = {name.replace(f".attentions.0.{now}.", f".attentions.0.{before}."): tensor for name, tensor in found.items()}
    return found


SPELLINGS = ["of a checkpoint", "alone", "diffusers", "diffusers before 0.17"]


@pytest.fixture(scope="module")
def other_vae() -> Any:
    torch.manual_seed(5)
    return AutoencoderKL.from_config(AutoencoderKL.load_config(DEMO_FOLDER / "vae"))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_autoencoder_in_a_file_takes_the_place_of_the_models(
    demo_file: Path, other_vae: Any, tmp_path: Path, spelling: str, dtype: torch.dtype
) -> None:
    vae = write_checkpoint(tmp_path / "other.vae.safetensors", spelled(other_vae, spelling), dtype)
    for path in (DEMO_FOLDER, demo_file):
        model = check_model(path, vae=vae)
        loaded = pipeline_of(model, torch.float32)
        for name, tensor in other_vae.state_dict().items():
            weight = loaded.vae.state_dict()[name]
            assert (weight.dtype, weight.device.type, loaded.vae.training) == (torch.float32, "cpu", False)
            assert torch.equal(weight, tensor.to(dtype).float()), name
        assert model.hash != check_model(path).hash


def test_the_picture_is_that_of_diffusers_with_the_other_autoencoder(other_vae: Any, tmp_path: Path) -> None:
    vae = write_checkpoint(tmp_path / "x.safetensors", spelled(other_vae, "alone"))
    engine = RecordingEngine(Engine(lambda: Denoiser(load(check_model(DEMO_FOLDER, vae=vae), "fp32")), max_batch_size=2), [])
    task = make_task()
    (picture,) = engine.draw([task])
    engine.engine.close()
    folder = tmp_path / "whole"
    StableDiffusionPipeline.from_pretrained(DEMO_FOLDER, dtype=torch.float32, vae=other_vae).save_pretrained(folder)
    assert_same_picture(picture.image, draw_with_diffusers(folder, task))


def test_the_hash_is_that_of_the_folder_with_the_other_autoencoder(other_vae: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO_FOLDER, tmp_path / "model"))
    other_vae.save_pretrained(folder / "vae")
    for spelling in SPELLINGS:
        vae = write_checkpoint(tmp_path / "x.safetensors", spelled(other_vae, spelling))
        assert check_model(DEMO_FOLDER, vae=vae).hash == check_model(folder).hash


def test_a_file_without_an_autoencoder_is_served_with_another(demo_file: Path, other_vae: Any, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in load_file(demo_file).items() if not name.startswith("first_stage_model.")}
    file = write_checkpoint(tmp_path / "x.safetensors", tensors)
    with pytest.raises(ModelFolderError, match=r"its autoencoder \(VAE\) is missing"):
        check_model(file)
    write_checkpoint(tmp_path / "vae" / "other.safetensors", spelled(other_vae, "alone"))
    (tmp_path / "x.defaults.json").write_text('{"vae": "vae/other.safetensors"}')
    loaded = pipeline_of(check_model(file), torch.float32)
    assert torch.equal(loaded.vae.decoder.conv_out.weight, other_vae.decoder.conv_out.weight)


def test_a_text_encoder_in_the_names_of_2022_is_loaded(demo_file: Path, tmp_path: Path) -> None:
    """Without `text_model`, which diffusers' loader looks for."""
    renamed = {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in load_file(demo_file).items()}
    model = check_model(write_checkpoint(tmp_path / "x.safetensors", renamed))
    assert model.hash == check_model(demo_file).hash
    assert model.weight_shapes("text_encoder") == check_model(demo_file).weight_shapes("text_encoder")
    assert_same_weights(pipeline_of(model, torch.float32), StableDiffusionPipeline.from_pretrained(DEMO_FOLDER), torch.float16)
