"""Models in one file, by their headers: which are served, and what is said of all others. `tests/model` proves that they load."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stable_diffusion.core.errors import ModelFolderError
from stable_diffusion.models.clip_vocabulary import clip_vocabulary
from stable_diffusion.models.folder import DEMO_FOLDER, ModelFolder, check_model, choose_model
from stable_diffusion.models.ldm_names import tensors_of
from stable_diffusion.models.loras import model_layers
from stable_diffusion.models.single_file import KINDS, Kind
from tests.tensor_files import write

Shapes = dict[str, tuple[int, ...]]
SD1, _, SD2, _, SD2_INPAINTING, SDXL, _, _, DEMO = KINDS
UNET = "model.diffusion_model."


def shapes_of(kind: Kind) -> Shapes:
    """All that a file of this kind must have."""
    names = ["cond_stage_model.model.token_embedding.weight"] if "2.x" in kind.title else []
    components = [part.parent.name for part in kind.folder.glob("*/config.json")]
    return {
        tensor.source: tensor.file_shapes[0] for component in components for tensor in tensors_of(component, kind.config(component), names)
    }


DEMO_SHAPES = shapes_of(DEMO)


def refusal(file: Path, *expected: str) -> str:
    with pytest.raises(ModelFolderError) as caught:
        check_model(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    for text in expected:
        assert text in message
    return message


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("name", ["model.safetensors", "sdxl-flux-inpainting_v2.1.safetensors"])
def test_the_kind_follows_from_the_content_and_not_from_the_name(tmp_path: Path, dtype: str, name: str) -> None:
    model = check_model(write(tmp_path / name, shapes_of(SD1), dtype=dtype))
    assert (model.name, model.file, model.path) == (name.removesuffix(".safetensors"), tmp_path / name, SD1.folder)
    assert (model.native_width, model.native_height, model.scheduler, model.text_layers) == (512, 512, "PNDMScheduler", 12)
    assert (model.only_inpaints, model.is_xl, model.has_safety_checker, model.is_demo) == (False, False, False, False)
    assert (model.loras, model.embeddings) == (tmp_path / "loras", tmp_path / "embeddings")


def test_what_a_lora_may_change_is_known_by_the_names_of_diffusers(tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", DEMO_SHAPES)
    assert model_layers(check_model(file)) == model_layers(check_model(DEMO_FOLDER))


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        (
            {"model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight": (4, 4), "first_stage_model.x": (1,)},
            "a Stable Diffusion 3 model",
        ),
        ({"joint_blocks.0.context_block.adaLN_modulation.1.bias": (4,), "pos_embed": (1, 4, 4)}, "a Stable Diffusion 3 model"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": (4,), "img_in.weight": (4, 4)}, "a Flux model"),
        ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (4, 4), "vae.encoder.x": (1,)}, "a Flux model"),
        ({f"conditioner.embedders.0.model.{part}": (4,) for part in "ab"} | {f"{UNET}out.0.bias": (4,)}, "a Stable Diffusion XL refiner"),
        ({"lora_unet_x.lora_down.weight": (4, 4), "lora_unet_x.lora_up.weight": (4, 4)}, "a LoRA, not a whole model"),
        ({"unet.down_blocks.0.x.lora_A.weight": (4, 4), "unet.down_blocks.0.x.lora_B.weight": (4, 4)}, "a LoRA, not a whole model"),
        ({"unet.down_blocks.0.processor.to_q_lora.down.weight": (4, 4), "b": (1,)}, "a LoRA, not a whole model"),
        ({"lora_unet_x.hada_w1_a": (4, 4), "b": (1,)}, "a LoRA"),
        ({"emb_params": (2, 768)}, "a textual inversion"),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "a textual inversion"),
        ({"control_model.time_embed.0.weight": (4, 4), "control_model.zero_convs.0.0.weight": (4, 4)}, "a ControlNet"),
        ({"controlnet_cond_embedding.conv_in.weight": (4, 4), "conv_in.weight": (4, 4)}, "a ControlNet"),
        ({"encoder.conv_in.weight": (4, 4), "decoder.conv_in.weight": (4, 4)}, "an autoencoder (VAE) alone"),
        ({"first_stage_model.encoder.conv_in.weight": (4, 4), "first_stage_model.x": (4,)}, "an autoencoder (VAE) alone"),
        ({"text_model.embeddings.token_embedding.weight": (4, 4), "text_projection": (4, 4)}, "a text encoder alone"),
        ({"conv_in.weight": (4, 4), "down_blocks.0.resnets.0.conv1.weight": (4, 4)}, "one component of a diffusers folder"),
        ({"down_blocks.0.motion_modules.0.x": (4, 4), "b": (1,)}, "AnimateDiff"),
        ({"image_proj.proj.weight": (4, 4), "ip_adapter.1.to_k_ip.weight": (4, 4)}, "an IP-Adapter"),
        ({"edm_mean": (4,), **shapes_of(SDXL)}, "a model with EDM's noise"),
        ({"edm_vpred.sigma_max": (), **shapes_of(SDXL)}, "CosXL"),
        (
            {"conv_first.weight": (4, 4), "body.0.weight": (4, 4)},
            f"it is not a Stable Diffusion checkpoint: there is no {UNET}input_blocks",
        ),
        ({}, "it is not a Stable Diffusion checkpoint"),
        (shapes_of(SD1) | {f"{UNET}input_blocks.0.0.weight": (320, 8, 3, 3)}, "an InstructPix2Pix model: its UNet has 8 input channels"),
        (shapes_of(SD2) | {f"{UNET}input_blocks.0.0.weight": (320, 5, 3, 3)}, "a depth-to-image model"),
        (shapes_of(SD2) | {f"{UNET}input_blocks.0.0.weight": (256, 7, 3, 3)}, "an upscaler"),
        (
            shapes_of(SDXL) | {f"{UNET}input_blocks.0.0.weight": (384, 4, 3, 3)},
            "384 channels in its first layer, texts of width 2048 and takes",
        ),
        (shapes_of(SD1) | {f"{UNET}input_blocks.0.0.weight": (320,)}, "has shape [320], which no Stable Diffusion model has"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_what_it_is(tmp_path: Path, shapes: Shapes, what: str) -> None:
    file = write(tmp_path / "x.safetensors", shapes, dtype="F16")
    refusal(file, what, "expected Stable Diffusion 1.x or Stable Diffusion 1.x for inpainting or Stable Diffusion 2.x")


def without(prefix: str) -> Shapes:
    return {name: shape for name, shape in DEMO_SHAPES.items() if not name.startswith(prefix)}


SD1_SHAPES, SD2_SHAPES = shapes_of(SD1), shapes_of(SD2)
FIRST_QUERY = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        (without("first_stage_model."), "its autoencoder (VAE) is missing: there is no first_stage_model.encoder.conv_in.weight"),
        (without("cond_stage_model."), "its text encoder is missing: there is no cond_stage_model.transformer.text_model.embeddings"),
        (
            without("first_stage_model.decoder.conv_out.bias"),
            "first_stage_model.decoder.conv_out.bias of its autoencoder (VAE) are missing",
        ),
        (without(f"{UNET}output_blocks."), "and 229 more of its UNet are missing, expected the demo model: the file is cut, or mixed"),
        (DEMO_SHAPES | {FIRST_QUERY: (64, 65)}, f"{FIRST_QUERY} has shape [64, 65], the demo model has [64, 64] there"),
        (DEMO_SHAPES | {f"{UNET}input_blocks.99.0.x": (1,)}, "its UNet has 'model.diffusion_model.input_blocks.99.0.x', which the demo"),
        (DEMO_SHAPES | {"vae.encoder.conv_in.weight": (1,)}, "it holds two autoencoders"),
        (
            {name: shape for name, shape in SD1_SHAPES.items() if not name.startswith("cond_stage_model.")}
            | {name: shape for name, shape in SD2_SHAPES.items() if name.startswith("cond_stage_model.")},
            "cond_stage_model.model.token_embedding.weight has shape [49408, 1024], Stable Diffusion 1.x has [49408, 768] there",
        ),
    ],
)
def test_a_cut_or_mixed_file_is_refused_by_what_is_wrong(tmp_path: Path, shapes: Shapes, what: str) -> None:
    refusal(write(tmp_path / "x.safetensors", shapes, dtype="F16"), what)


@pytest.mark.parametrize(
    "extra",
    [
        {"model_ema.diffusion_modeltime_embed0weight": (4, 4), "model_ema.decay": ()},
        {"betas": (1000,), "logvar": (1000,), "alphas_cumprod": (1000,)},
        {"first_stage_model.loss.logvar": (), "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77)},
    ],
)
def test_what_training_leaves_in_a_file_does_no_harm(tmp_path: Path, extra: Shapes) -> None:
    assert check_model(write(tmp_path / "x.safetensors", DEMO_SHAPES | extra)).path == DEMO_FOLDER


def test_an_autoencoder_of_linear_layers_fits_too(tmp_path: Path) -> None:
    """As some trainers write its attention."""
    linear = {name: shape[:2] if ".attn_1." in name and len(shape) == 4 else shape for name, shape in DEMO_SHAPES.items()}
    assert linear != DEMO_SHAPES
    check_model(write(tmp_path / "x.safetensors", linear))


@pytest.mark.parametrize(
    ("beginning", "what"),
    [
        (b"PK\x03\x04" + b"\0" * 60, "a pickle in a ZIP archive, as torch.save writes it, which can run code when it is loaded"),
        (b"\x80\x02}q\x00X" + b"\0" * 60, "a pickle, which can run code when it is loaded"),
        (b"\x80\x04\x95" + b"\0" * 60, "a pickle, which can run code when it is loaded"),
        (b"GGUF\x03\0\0\0" + b"\0" * 60, "a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, whose file has not been downloaded"),
        (b"<!DOCTYPE html><html>Log in</html>", "a web page or XML, perhaps a download that asked to log in"),
        (b"", "not a safetensors file"),
        (b"\x10\0\0\0\0\0\0\0{}", "not a safetensors file"),
        (b"\xff" * 100, "not a safetensors file"),
    ],
)
def test_a_file_that_is_called_safetensors_and_is_not_is_refused_by_what_it_is(tmp_path: Path, beginning: bytes, what: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(beginning)
    refusal(file, what)


@pytest.mark.parametrize("name", ["x.ckpt", "x.CKPT", "x.pt", "x.bin"])
def test_a_pickle_is_refused_by_its_name_whatever_it_holds(tmp_path: Path, name: str) -> None:
    refusal(write(tmp_path / name, DEMO_SHAPES), "a pickle can run code when it is loaded, only safetensors are served")


@pytest.mark.parametrize("name", ["x.SAFETENSORS", "x", "x.safetensors.part", "x.gguf"])
def test_a_name_that_diffusers_would_read_as_a_pickle_is_refused(tmp_path: Path, name: str) -> None:
    refusal(write(tmp_path / name, DEMO_SHAPES), "a model in one file must have a name that ends in .safetensors")


def test_a_name_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").symlink_to(tmp_path / "gone")
    refusal(tmp_path / "x.safetensors", "no such folder or file")


def test_a_link_to_a_file_is_followed_and_keeps_its_name(tmp_path: Path) -> None:
    """As the hub's cache has them."""
    blob = write(tmp_path / "0123abcd", DEMO_SHAPES)
    (tmp_path / "x.safetensors").symlink_to(blob)
    assert check_model(tmp_path / "x.safetensors").name == "x"


def test_a_half_downloaded_file_is_refused_by_its_length(tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", DEMO_SHAPES)
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 1000)
    refusal(file, f"has {size - 1000} bytes, {size} are expected, perhaps half downloaded")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"dtype": "I32"}, f"{FIRST_QUERY} holds I32, expected F16, BF16, F32, F64"),
        ({"dtype": "F8_E4M3"}, "not a valid safetensors file"),
        ({"dtype": "F99"}, "not a valid safetensors file"),
        ({"shape": [64, 63]}, "not a valid safetensors file"),
        ({"shape": [-64, -64]}, "not a valid safetensors file"),
        ({"shape": None}, "not a valid safetensors file"),
        ({"data_offsets": [0, 16384]}, "not a valid safetensors file"),
        ({"data_offsets": [0, "x"]}, "not a safetensors file"),
        ({"data_offsets": None}, "not a safetensors file"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    refusal(write(tmp_path / "x.safetensors", DEMO_SHAPES, changes={FIRST_QUERY: change}), what)


def test_numbers_of_eight_bits_are_refused_by_name(tmp_path: Path) -> None:
    refusal(write(tmp_path / "x.safetensors", DEMO_SHAPES, dtype="F8_E4M3"), "holds F8_E4M3, expected F16, BF16, F32, F64")


_JSON = st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3), max_leaves=4)


@settings(max_examples=60)
@given(data=st.data())
def test_no_header_does_anything_but_to_be_served_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "headers"
    name = data.draw(st.sampled_from(sorted(DEMO_SHAPES)))
    change = data.draw(st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), _JSON, max_size=2))
    file = write(folder / "x.safetensors", DEMO_SHAPES, dtype="F16", changes={name: change})
    if not change:
        check_model(file)
    else:
        with pytest.raises(ModelFolderError):
            check_model(file)


@settings(max_examples=60)
@given(position=st.integers(8, 60_000), byte=st.integers(0, 255))
def test_no_damaged_header_does_anything_but_to_be_served_or_refused(
    position: int, byte: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = write(tmp_path_factory.getbasetemp() / "damaged" / "x.safetensors", DEMO_SHAPES, dtype="F16")
    with file.open("r+b") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        place = min(position, 7 + size)
        stream.seek(place)
        (before,) = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte]))
    if before == byte:
        check_model(file)
        return
    try:
        model: ModelFolder | None = check_model(file)
    except ModelFolderError:
        model = None
    assert model is None or model.path == DEMO_FOLDER


def test_the_file_in_the_services_folder_is_served(tmp_path: Path) -> None:
    file = write(tmp_path / "models" / "mine.safetensors", DEMO_SHAPES)
    for in_bento in (False, True):
        model = choose_model(tmp_path / "models", {}, in_bento=in_bento)
        assert (model.name, model.file, model.is_demo) == ("mine", file, False)
        assert model.loras == tmp_path / "models" / "loras"


def test_several_files_are_refused_until_one_is_named(tmp_path: Path) -> None:
    files = [write(tmp_path / "models" / f"{name}.safetensors", DEMO_SHAPES) for name in ("one", "two")]
    with pytest.raises(
        ModelFolderError, match=r"models holds 2 models \(one.safetensors, two.safetensors\): set SD_MODEL to the path of the one"
    ):
        choose_model(tmp_path / "models", {}, in_bento=False)
    assert choose_model(tmp_path / "models", {"SD_MODEL": str(files[1])}, in_bento=False).file == files[1]
    assert choose_model(tmp_path / "models", {"SD_MODEL": "demo"}, in_bento=False).is_demo


def test_a_folder_of_weights_counts_beside_a_file(tmp_path: Path) -> None:
    write(tmp_path / "models" / "mine.safetensors", DEMO_SHAPES)
    (tmp_path / "models" / "v1_4" / ".cache").mkdir(parents=True)
    with pytest.raises(ModelFolderError, match=r"holds 2 models \(mine.safetensors, v1_4\)"):
        choose_model(tmp_path / "models", {}, in_bento=False)


def test_a_pickle_in_the_services_folder_is_never_passed_over_for_the_demo_model(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelFolderError, match=r"mine.ckpt: a pickle can run code"):
        choose_model(tmp_path / "models", {}, in_bento=False)
    file = write(tmp_path / "models" / "mine.safetensors", DEMO_SHAPES)
    assert choose_model(tmp_path / "models", {}, in_bento=False).file == file


def say(file: Path, **content: Any) -> None:
    file.with_name(f"{file.stem}.defaults.json").write_text(json.dumps(content))


def test_defaults_lie_beside_the_file_under_its_name(tmp_path: Path) -> None:
    file = write(tmp_path / "turbo.v1.safetensors", DEMO_SHAPES)
    say(file, steps=4, guidance_scale=0.0, scheduler="Euler a", width=128, height=64)
    model = check_model(file)
    assert (model.defaults.num_inference_steps, model.defaults.guidance_scale, model.scheduler) == (
        4,
        0.0,
        "EulerAncestralDiscreteScheduler",
    )
    assert (model.native_width, model.native_height) == (128, 64)
    say(file, stepz=4)
    with pytest.raises(ModelFolderError, match=r"turbo.v1.defaults.json: .*stepz"):
        check_model(file)


def test_a_file_of_stable_diffusion_2_does_not_show_its_prediction_type_and_the_operator_may_say_it(tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", SD2_SHAPES, dtype="F16")
    unknown = check_model(file)
    assert (unknown.is_prediction_type_unknown, unknown.native_width, unknown.text_layers) == (True, 768, 23)
    say(file, prediction_type="v_prediction")
    predicts_v = check_model(file)
    assert (predicts_v.is_prediction_type_unknown, predicts_v.native_width, predicts_v.path) == (False, 768, SD2.folder)
    say(file, prediction_type="epsilon")
    base = check_model(file)
    assert (base.is_prediction_type_unknown, base.native_width, base.scheduler) == (False, 512, "PNDMScheduler")
    assert base.scheduler_config()["prediction_type"] == "epsilon"
    assert base.hash != predicts_v.hash == unknown.hash
    say(file, prediction_type="sample")
    with pytest.raises(ModelFolderError, match=r"prediction_type"):
        check_model(file)


def test_other_kinds_predict_noise_unless_the_operator_or_a_marker_says_otherwise(tmp_path: Path) -> None:
    def scheduler_of(shapes: Shapes, **said: str) -> tuple[Any, ...]:
        file = write(tmp_path / "x.safetensors", shapes, dtype="F16")
        say(file, **said)
        model = check_model(file)
        assert not model.is_prediction_type_unknown
        config = model.scheduler_config()
        return config["prediction_type"], config.get("rescale_betas_zero_snr", False), config["timestep_spacing"]

    assert scheduler_of(SD1_SHAPES) == ("epsilon", False, "leading")
    assert scheduler_of(shapes_of(SD2_INPAINTING)) == ("epsilon", False, "leading")
    assert scheduler_of(SD1_SHAPES, prediction_type="v_prediction") == ("v_prediction", False, "leading")
    xl = shapes_of(SDXL)
    assert scheduler_of(xl) == ("epsilon", False, "leading")
    assert scheduler_of(xl | {"v_pred": ()}) == ("v_prediction", False, "leading")
    assert scheduler_of(xl | {"v_pred": (), "ztsnr": ()}) == ("v_prediction", True, "trailing")
    assert scheduler_of(xl | {"v_pred": ()}, prediction_type="epsilon") == ("epsilon", False, "leading")


def test_a_folder_too_may_say_its_prediction_type(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO_FOLDER, tmp_path / "model"))
    before = check_model(folder)
    (folder / "defaults.json").write_text('{"prediction_type": "v_prediction"}')
    after = check_model(folder)
    assert (before.scheduler_config()["prediction_type"], after.scheduler_config()["prediction_type"]) == ("epsilon", "v_prediction")
    assert after.hash != before.hash


def test_the_vocabulary_is_clips() -> None:
    tokens, merges = clip_vocabulary()
    assert (len(tokens), len(merges)) == (49408, 48894)
    assert [tokens[token] for token in ("!", "a</w>", "the</w>", "<|startoftext|>", "<|endoftext|>")] == [0, 320, 518, 49406, 49407]
