"""Which model folder is served, and what is wrong with one that is not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from stable_diffusion.core.errors import ModelFolderError
from stable_diffusion.models.folder import DEMO_FOLDER, check_model, choose_model, models_in

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the demo model, to be broken."""
    return Path(shutil.copytree(DEMO_FOLDER, tmp_path / "v1_4"))


def test_a_whole_folder_is_described_by_its_json_files(folder: Path) -> None:
    model = check_model(folder)
    assert (model.name, model.native_width, model.native_height, model.scheduler) == ("v1_4", 64, 64, "PNDMScheduler")
    assert not model.is_demo
    assert not model.only_inpaints
    assert model.variant is None


def test_half_precision_files_under_the_hubs_names_are_found(folder: Path) -> None:
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert check_model(folder).variant == "fp16"


def test_components_of_two_variants_are_refused(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".fp16.safetensors"))
    with pytest.raises(ModelFolderError, match="only half-precision files"):
        check_model(folder)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("model_index.json", None, "missing"),
        ("model_index.json", b'{"_class_name": "Stable', "not valid JSON"),
        ("model_index.json", b'{"_class_name": "StableDiffusion3Pipeline"}', "is not a Stable Diffusion 1.x, 2.x or XL model"),
        ("unet/config.json", None, "missing"),
        ("unet/config.json", b'{"in_channels": 5, "sample_size": 8}', "in_channels is 5"),
        ("unet/diffusion_pytorch_model.safetensors", None, "missing"),
        ("unet/diffusion_pytorch_model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "not a safetensors file"),
        ("vae/diffusion_pytorch_model.safetensors", b"", "not a safetensors file"),
        ("text_encoder/model.safetensors", b"\x10\0\0\0\0\0\0\0{}", "not a safetensors file"),
        ("scheduler/scheduler_config.json", None, "missing"),
        ("unet/config.json", b'{"in_channels": 4, "sample_size": null}', "sample_size is None"),
        ("vae/config.json", b"{}", "block_out_channels is missing"),
        ("tokenizer/tokenizer_config.json", None, "missing"),
        ("tokenizer/tokenizer.json", b'{"version": "1.', "not valid JSON"),
    ],
)
def test_the_message_names_the_file_that_is_wrong(folder: Path, file: str, content: bytes | None, told: str) -> None:
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(ModelFolderError, match=told) as caught:
        check_model(folder)
    assert file in str(caught.value)


def test_a_half_downloaded_weight_file_is_refused_by_its_length(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1000])
    with pytest.raises(ModelFolderError, match=f"{file}: has {len(content) - 1000} bytes, {len(content)} are expected"):
        check_model(folder)


@pytest.mark.parametrize(
    "name",
    [
        "vae/diffusion_pytorch_model.bin",
        "unet/model.ckpt",
        "sd-v1-4.ckpt",
        "text_encoder/pytorch_model.PT",
        "tokenizer/x/y/z.pth",
        "scheduler/state.pkl",
        "notes/state.pickle",
    ],
)
def test_a_pickle_is_refused_wherever_it_lies(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"a pickle")
    with pytest.raises(ModelFolderError, match=r"a pickle can run code when it is loaded, .* move it out of the model's folder") as caught:
        check_model(folder)
    assert str(folder / name) in str(caught.value)


def test_a_pickle_is_found_in_a_component_that_is_a_link(folder: Path, tmp_path: Path) -> None:
    (folder / "vae").rename(tmp_path / "vae")
    (folder / "vae").symlink_to(tmp_path / "vae")
    check_model(folder)
    (tmp_path / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ModelFolderError, match=r"diffusion_pytorch_model.bin: a pickle can run code"):
        check_model(folder)


def test_a_safety_checker_that_the_index_names_must_be_there(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFolderError, match="safety_checker"):
        check_model(folder)
    shutil.copytree(folder / "text_encoder", folder / "safety_checker")
    with pytest.raises(ModelFolderError, match=r"feature_extractor/preprocessor_config.json: missing"):
        check_model(folder)


def test_missing_tokenizer_files_are_named(folder: Path) -> None:
    for name in ("tokenizer.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink()
    with pytest.raises(ModelFolderError, match=r"tokenizer: tokenizer.json, or vocab.json and merges.txt, are missing"):
        check_model(folder)


def test_a_checkout_without_weights_serves_the_demo_model(tmp_path: Path) -> None:
    assert choose_model(tmp_path, {}, in_bento=False).is_demo


def test_a_bento_without_weights_refuses_unless_the_demo_is_asked_for_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="this bento holds no weights in models/.*SD_MODEL=demo"):
        choose_model(tmp_path / "models", {}, in_bento=True)
    assert choose_model(tmp_path / "models", {"SD_MODEL": "demo"}, in_bento=True).is_demo


@pytest.mark.parametrize("in_bento", [False, True])
def test_a_broken_download_is_never_passed_over_for_the_demo_model(tmp_path: Path, in_bento: bool) -> None:
    (tmp_path / "v1_4" / ".cache").mkdir(parents=True)
    with pytest.raises(ModelFolderError, match=r"model_index.json: missing"):
        choose_model(tmp_path, {}, in_bento=in_bento)


def test_the_one_folder_in_models_is_served_under_its_name(folder: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    for name in ("loras", "embeddings", ".cache"):
        (models / name).mkdir(parents=True)
        (models / name / "x.safetensors").write_bytes(b"no model")
    (models / ".gitkeep").touch()
    (models / "empty").mkdir()
    (models / "x.source.json").write_text("{}")
    assert models_in(models) == []
    assert choose_model(models, {}, in_bento=False).is_demo
    folder.rename(models / "pictures")
    assert models_in(models) == [models / "pictures"]
    assert choose_model(models, {}, in_bento=True).name == "pictures"


def test_of_several_models_none_is_served_until_one_is_named(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"a model in one file")
    assert models_in(tmp_path) == [folder, file]
    with pytest.raises(ModelFolderError) as caught:
        choose_model(tmp_path, {}, in_bento=False)
    told = f"{tmp_path} holds 2 models (v1_4, x.safetensors): set SD_MODEL to the path of the one to serve, such as {folder}"
    assert str(caught.value) == told
    assert choose_model(tmp_path, {"SD_MODEL": str(folder)}, in_bento=False).path == folder
    assert choose_model(tmp_path, {"SD_MODEL": "demo"}, in_bento=False).is_demo


def test_sd_model_names_another_folder(folder: Path, tmp_path: Path) -> None:
    assert choose_model(tmp_path / "nowhere" / "models", {"SD_MODEL": str(folder)}, in_bento=True).path == folder
    with pytest.raises(ModelFolderError, match=f"^SD_MODEL: {tmp_path / 'nowhere'}: no such folder or file$"):
        choose_model(tmp_path, {"SD_MODEL": str(tmp_path / "nowhere")}, in_bento=False)


def test_a_relative_path_in_sd_model_is_reported_as_the_folder_that_was_looked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fp32").mkdir()
    monkeypatch.chdir(tmp_path / "fp32")
    with pytest.raises(ModelFolderError, match=f"^SD_MODEL: {tmp_path}/fp32/weights: no such folder or file$"):
        choose_model(folder, {"SD_MODEL": "weights"}, in_bento=False)


def test_what_api_workers_import_loads_no_torch() -> None:
    program = "import sys, fp32.service; print(*{'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    finished = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout.split() == []


def test_the_hash_is_of_the_weights_and_not_of_their_place(folder: Path) -> None:
    known = check_model(DEMO_FOLDER).hash
    assert len(known) == 10
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert check_model(folder).hash == known


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_the_hash_differs_where_one_tensor_was_trained_on(folder: Path, component: str) -> None:
    known = check_model(folder).hash
    (file,) = (folder / component).glob("*.safetensors")
    with safe_open(file, "np") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    smallest = min(tensors, key=lambda name: tensors[name].nbytes)
    trained = {name: tensor * np.float32(1.001) if name == smallest else tensor for name, tensor in tensors.items()}
    save_file(tensors, file)
    assert check_model(folder).hash == known  # saved again, without the old header's remarks
    save_file(trained, file)
    assert check_model(folder).hash != known


def test_the_hash_differs_where_the_noise_is_another(folder: Path) -> None:
    known = check_model(folder).hash
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_diffusers_version": "9.9"}))
    assert check_model(folder).hash == known
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    assert check_model(folder).hash != known
