"""Which files of a folder are textual inversions for the model's text encoder, and what the others are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stable_diffusion.models.embeddings import TextualInversions, read_embeddings
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from tests.tensor_files import write, write_raw

WIDTH = 96


def read(folder: Path) -> TextualInversions:
    return read_embeddings(replace(check_model(DEMO_FOLDER), embeddings=folder))


@pytest.mark.parametrize(
    ("tensors", "tensor", "vectors"),
    [
        ({"emb_params": (3, WIDTH)}, "emb_params", 3),  # A1111's
        ({"<token>": (WIDTH,)}, "<token>", 1),  # diffusers'
        ({"<token>": (75, WIDTH)}, "<token>", 75),
        ({"emb_params": (1, WIDTH), "more": (2, 2)}, "emb_params", 1),
    ],
)
def test_both_formats_are_read(tmp_path: Path, tensors: dict[str, tuple[int, ...]], tensor: str, vectors: int) -> None:
    write(tmp_path / "people" / "style.safetensors", tensors)
    found = read(tmp_path)
    assert found.refused == {}
    one = found.files["style"]
    assert (one.name, one.tensors, one.vectors, one.width) == ("style", (tensor,), vectors, WIDTH)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"emb_params": (3, 768)}, "its vectors have 768 values, the model's text encoder has 96: it is for another kind of model"),
        ({"clip_l": (1, 768), "clip_g": (1, 1280)}, "it is for Stable Diffusion XL"),
        ({"emb_params": (76, WIDTH)}, "it has 76 vectors, at most 75 fit into a prompt"),
        ({"a": (1, WIDTH), "b": (1, WIDTH)}, "it is not a textual inversion"),
        ({"emb_params": (1, 1, WIDTH)}, "it is not a textual inversion"),
        ({"emb_params": ()}, "it is not a textual inversion"),
        ({"unet.conv_in.lora_A.weight": (4, 4, 3, 3)}, "it is not a textual inversion"),
        ({}, "it is not a textual inversion"),
    ],
    ids=str,
)
def test_other_files_are_refused_as_what_they_are(tmp_path: Path, tensors: dict[str, tuple[int, ...]], told: str) -> None:
    write(tmp_path / "bad.safetensors", tensors)
    assert read(tmp_path).refused == {"bad.safetensors": told}


@pytest.mark.parametrize("name", ["style.pt", "style.bin", "style.PT"])
def test_a_pickle_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    assert read(tmp_path).refused == {name: "a pickle can run code when it is loaded, only safetensors are served"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"shape": None}, "'emb_params' has no valid shape and data_offsets"),
        ({"dtype": "I64"}, "'emb_params' holds I64, expected F16, BF16, F32, F64"),
        ({"shape": [2, WIDTH]}, "'emb_params' has 384 bytes, which do not match the shape [2, 96] of F32"),
    ],
)
def test_a_header_that_describes_what_cannot_be_is_refused(tmp_path: Path, change: dict[str, object], told: str) -> None:
    write(tmp_path / "bad.safetensors", {"emb_params": (1, WIDTH)}, changes={"emb_params": change})
    assert read(tmp_path).refused == {"bad.safetensors": told}


def test_a_broken_file_and_a_link_out_of_the_folder_are_refused_and_the_others_are_there(tmp_path: Path) -> None:
    folder = tmp_path / "embeddings"
    write_raw(folder / "broken.safetensors", b"{}", header_size=4 * 2**30)
    write(folder / "good.safetensors", {"emb_params": (2, WIDTH)})
    write(folder / "twice" / "good.safetensors", {"emb_params": (2, WIDTH)})
    (folder / "link.safetensors").symlink_to(write(tmp_path / "outside.safetensors", {"emb_params": (2, WIDTH)}))
    found = read(folder)
    assert list(found.files) == ["good"]
    assert set(found.refused) == {"broken.safetensors", "good.safetensors", "link.safetensors"}
    assert found.refused["link.safetensors"] == "is a link out of the folder"


def test_a_folder_that_does_not_exist_has_none(tmp_path: Path) -> None:
    assert read(tmp_path / "none") == TextualInversions({}, {})
