"""An autoencoder in a file of its own: where it may be named, and what is said of one that does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from stable_diffusion.core.errors import ModelFolderError, SettingError
from stable_diffusion.models.folder import DEMO_FOLDER, check_model, choose_model
from stable_diffusion.models.ldm_names import tensors_of_vae
from stable_diffusion.models.single_file import KINDS
from tests.tensor_files import write
from tests.unit.models.test_single_file import DEMO_SHAPES, SD1, Shapes

VAE_SHAPES: Shapes = {tensor.source: tensor.shape for tensor in tensors_of_vae(KINDS[-1].config("vae"), ())}


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    return write(tmp_path / "vaes" / "other.safetensors", VAE_SHAPES, dtype="F16")


def test_the_setting_goes_for_every_model(vae: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", DEMO_SHAPES)
    for model in ("demo", str(DEMO_FOLDER), str(file), ""):
        assert choose_model(tmp_path / "v1_4", {"SD_MODEL": model, "SD_VAE": str(vae)}, in_bento=False).vae == vae
        assert choose_model(tmp_path / "v1_4", {"SD_MODEL": model}, in_bento=False).vae is None
    with pytest.raises(SettingError, match="SD_VAE: the value is in quotes"):
        choose_model(tmp_path / "v1_4", {"SD_VAE": f'"{vae}"'}, in_bento=False)


def test_a_models_defaults_name_one_and_the_setting_comes_first(vae: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO_FOLDER, tmp_path / "model"))
    for path, defaults in (
        (folder, folder / "defaults.json"),
        (write(tmp_path / "x.safetensors", DEMO_SHAPES), tmp_path / "x.defaults.json"),
    ):
        mine = write(defaults.parent / "mine.safetensors", VAE_SHAPES)
        defaults.write_text(json.dumps({"vae": mine.name}))
        assert check_model(path).vae == mine
        assert check_model(path, vae=vae).vae == vae
        defaults.write_text('{"vae": "gone.safetensors"}')
        with pytest.raises(ModelFolderError, match=f"{defaults.parent}/gone.safetensors: missing"):
            check_model(path)


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        (DEMO_SHAPES, "it is a whole model; expected an autoencoder (VAE) alone"),
        ({"lora_unet_x.lora_down.weight": (4, 4)}, "it is not an autoencoder (VAE): there is no encoder.conv_in.weight"),
        ({}, "it is not an autoencoder (VAE)"),
        (
            {name: shape for name, shape in VAE_SHAPES.items() if not name.startswith("decoder.up.0")},
            "of its autoencoder (VAE) are missing",
        ),
        (
            {tensor.source: tensor.shape for tensor in tensors_of_vae(SD1.config("vae"), ())},
            "are missing, expected an autoencoder like the model's",
        ),
        (
            VAE_SHAPES | {"encoder.conv_in.bias": (17,)},
            "encoder.conv_in.bias has shape [17], an autoencoder like the model's has [16] there",
        ),
    ],
)
def test_one_that_does_not_fit_is_refused_by_what_it_is(tmp_path: Path, shapes: Shapes, what: str) -> None:
    file = write(tmp_path / "x.safetensors", shapes, dtype="F16")
    with pytest.raises(ModelFolderError) as caught:
        check_model(DEMO_FOLDER, vae=file)
    assert str(caught.value).startswith(f"{file}: ")
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "what"), [("x.vae.pt", b"\x80\x02", "a pickle can run code"), ("x.safetensors", b"PK\x03\x04", "a pickle in")]
)
def test_a_pickle_is_refused(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelFolderError, match=what):
        check_model(DEMO_FOLDER, vae=tmp_path / name)
