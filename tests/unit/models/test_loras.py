"""Which files of a folder are LoRAs for the model, and what the others are. Nothing that lies there breaks the list."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from stable_diffusion.core.errors import LoraNotFound
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from stable_diffusion.models.loras import LayerChange, LoraFolder
from tests.tensor_files import write, write_raw

MODEL = check_model(DEMO_FOLDER)
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"  # 96 to 96
CONVOLUTION = "down_blocks.0.resnets.0.conv1"  # 64 to 64, 3x3
OF_LINEAR = {"lora_A.weight": (4, 96), "lora_B.weight": (96, 4)}


def unet(parts: dict[str, tuple[int, ...]] | None = None, layer: str = f"unet.{LAYER}") -> dict[str, tuple[int, ...]]:
    return {f"{layer}.{part}": shape for part, shape in (OF_LINEAR if parts is None else parts).items()}


def reason(folder: Path, name: str = "bad.safetensors") -> str:
    loras = LoraFolder(folder, MODEL).look()
    assert not loras.files, "it is refused"
    return loras.refused[name]


def only(folder: Path) -> Any:
    loras = LoraFolder(folder, MODEL).look()
    assert loras.refused == {}
    (file,) = loras.files.values()
    return file


def test_a_folder_that_does_not_exist_has_none(tmp_path: Path) -> None:
    loras = LoraFolder(tmp_path / "none", MODEL).look()
    assert (loras.files, loras.refused) == ({}, {})


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_a_file_says_which_tensors_change_which_layer(tmp_path: Path, dtype: str) -> None:
    name = "mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    shapes = {f"lora_unet_{name}.lora_down.weight": (4, 96), f"lora_unet_{name}.lora_up.weight": (96, 4), f"lora_unet_{name}.alpha": ()}
    write(tmp_path / "styles" / "hollow.safetensors", shapes, dtype=dtype, metadata={"ss_output_name": "Hollow v2", "ss_steps": "100"})
    file = only(tmp_path)
    assert (file.name, file.alias, file.metadata["ss_steps"]) == ("hollow", "Hollow v2", "100")
    down, up, alpha = shapes
    assert file.layers == {"unet": {LAYER: LayerChange(down, up, alpha, (4, 96), (96, 4))}, "text_encoder": {}, "text_encoder_2": {}}
    assert file.size_bytes == 4 * (4 * 96 + 96 * 4), "as float32"


@pytest.mark.parametrize(
    ("parts", "layer", "down_shape", "up_shape"),
    [
        ({"lora_A.weight": (4, 64, 3, 3), "lora_B.weight": (64, 4, 1, 1)}, CONVOLUTION, (4, 64, 3, 3), (64, 4, 1, 1)),
        # A 1x1 convolution is the same as a linear layer; both have been written for both.
        ({"lora_A.weight": (4, 96), "lora_B.weight": (96, 4)}, "mid_block.attentions.0.proj_in", (4, 96, 1, 1), (96, 4, 1, 1)),
        ({"lora_A.weight": (4, 96, 1, 1), "lora_B.weight": (96, 4, 1, 1)}, LAYER, (4, 96), (96, 4)),
    ],
)
def test_shapes_become_those_of_the_layer(
    tmp_path: Path, parts: dict[str, tuple[int, ...]], layer: str, down_shape: tuple[int, ...], up_shape: tuple[int, ...]
) -> None:
    write(tmp_path / "one.safetensors", unet(parts, f"unet.{layer}"))
    (change,) = only(tmp_path).layers["unet"].values()
    assert (change.down_shape, change.up_shape) == (down_shape, up_shape)


def test_the_hash_is_a1111s_and_does_not_depend_on_the_header(tmp_path: Path) -> None:
    """A1111, modules/hashes.py: the SHA-256 of what follows the header; its first 12 digits are shown."""
    write(tmp_path / "one.safetensors", unet(), metadata={"a": "b"}, fill=b"abc")
    content = (tmp_path / "one.safetensors").read_bytes()
    (header_size,) = struct.unpack("<Q", content[:8])
    assert only(tmp_path).hash == hashlib.sha256(content[8 + header_size :]).hexdigest()[:12]
    before = only(tmp_path).hash
    write(tmp_path / "one.safetensors", unet(), metadata={"a": "another text"}, fill=b"abc")
    assert only(tmp_path).hash == before
    write(tmp_path / "one.safetensors", unet(), fill=b"xyz")
    assert only(tmp_path).hash != before


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"hada_w1_a": (4, 4)}, "it is a LoHa, which is not supported"),
        ({"lokr_w1": (4, 4)}, "it is a LoKr, which is not supported"),
        (OF_LINEAR | {"dora_scale": (96, 1)}, "it is a DoRA, which is not supported"),
        (OF_LINEAR | {"lora_mid.weight": (4, 4, 3, 3)}, "it is a LoCon in CP decomposition, which is not supported"),
        ({"lora_A.weight": (4, 96)}, f"{LAYER}: up is missing"),
        ({"lora_B.weight": (96, 4)}, f"{LAYER}: down is missing"),
        ({"lora_A.weight": (4, 96), "lora_B.weight": (96, 5)}, "shapes [4, 96] and [96, 5] do not match"),
        ({"lora_A.weight": (4,), "lora_B.weight": (96, 4)}, "it changes 96 x 0 values, the model has 96 x 96"),
        (
            {"lora_A.weight": (4, 768), "lora_B.weight": (96, 4)},
            "it changes 96 x 768 values, the model has 96 x 96: it is for another kind",
        ),
        ({"lora_A.weight": (4, 96), "lora_B.weight": (320, 4)}, "it changes 320 x 96 values, the model has 96 x 96"),
        ({"lora_A.weight": (4, 96, 3, 3), "lora_B.weight": (96, 4, 1, 1)}, "it is for another kind of model"),
        ({"lora_A.weight": (4, 96), "lora_B.weight": (96, 4, 3, 3)}, "it is for another kind of model"),
        ({"lora_A.weight": (2000, 96), "lora_B.weight": (96, 2000)}, "do not match"),
        (OF_LINEAR | {"alpha": (2,)}, "alpha' is not one number"),
        ({"weight": (96, 96)}, "to_q.weight', which is not part of a LoRA"),
        ({}, "it holds no LoRA"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_is_refused_by_name(tmp_path: Path, parts: dict[str, tuple[int, ...]], told: str) -> None:
    write(tmp_path / "bad.safetensors", unet(parts))
    assert told in reason(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "it is a LoRA for Stable Diffusion XL, which the model is not"),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "it is a LoRA for Flux, which is not supported"),
        ("lora_unet_joint_blocks_0_x_block_mlp_fc1.lora_down.weight", "it is a LoRA for Stable Diffusion 3, which is not supported"),
        ("model.diffusion_model.out.2.weight", "it is a checkpoint, which is not supported"),
        ("emb_params", "it is a textual inversion, which is not supported"),
        ("lora_unet_down_blocks_2_attentions_1_transformer_blocks_9_attn1_to_k.lora_down.weight", "is not a layer of the model"),
        ("lora_unet_../../etc/passwd.lora_down.weight", "is not a layer of the model: it is for another kind of model"),
        ("\ud83d\ude00" * 4000 + ".alpha", "is not a layer of the model"),
    ],
    ids=lambda text: text[:40].encode("ascii", "replace").decode(),
)
def test_other_kinds_of_files_are_refused_as_what_they_are(tmp_path: Path, tensor: str, told: str) -> None:
    write(tmp_path / "bad.safetensors", {tensor: (4, 4)})
    assert told in reason(tmp_path)
    assert len(reason(tmp_path)) < 300


def test_two_spellings_of_one_layer_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "bad.safetensors", unet() | unet(layer=LAYER))
    assert f"it changes {LAYER} twice" in reason(tmp_path)


@pytest.mark.parametrize("name", ["bad.pt", "bad.ckpt", "bad.bin", "bad.PTH", "bad.pkl"])
def test_a_pickle_is_refused_without_being_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    os.chmod(tmp_path / name, 0)
    assert reason(tmp_path, name) == "a pickle can run code when it is loaded, only safetensors are served"


NO_SAFETENSORS = "not a safetensors file, perhaps half downloaded or a Git LFS pointer"


@pytest.mark.parametrize(
    ("header", "header_size", "told"),
    [
        (b"", None, NO_SAFETENSORS),
        (b"version https://git-lfs.github.com/spec/v1", None, NO_SAFETENSORS),
        (b"{}", 4 * 2**30, NO_SAFETENSORS),  # a header of 4 GB, of which two bytes are there
        (b"{}", 2**64 - 1, NO_SAFETENSORS),
        (b"[" * 100_000, None, NO_SAFETENSORS),
        (b"[]", None, NO_SAFETENSORS),
        (b"\xff\xfe", None, NO_SAFETENSORS),
        (b'{"a": 1}', None, NO_SAFETENSORS),
        (b'{"a": {"data_offsets": []}}', None, NO_SAFETENSORS),
        (b'{"a": {"data_offsets": [0, 1' + b"0" * 5000 + b"]}}", None, NO_SAFETENSORS),
        (b"{}", None, "it holds no LoRA"),
        (b'{"__metadata__": [1]}', None, "it holds no LoRA"),
        (b'{"__metadata__": "x"' + b" " * (9 * 2**20) + b"}", None, "its header has 9437205 bytes, at most 8388608 are read"),
    ],
    ids=range(13),
)
def test_a_broken_header_is_refused(tmp_path: Path, header: bytes, header_size: int | None, told: str) -> None:
    write_raw(tmp_path / "bad.safetensors", header, header_size=header_size)
    assert reason(tmp_path) == told


def test_a_header_of_four_gigabytes_that_is_there_is_not_read(tmp_path: Path) -> None:
    """A sparse file, which takes no room."""
    with (tmp_path / "bad.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", 4 * 2**30))
        stream.truncate(8 + 4 * 2**30)
    assert reason(tmp_path) == NO_SAFETENSORS


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"shape": None}, "has no valid shape and data_offsets"),
        ({"shape": "4x96"}, "has no valid shape and data_offsets"),
        ({"shape": [4, -96]}, "has no valid shape and data_offsets"),
        ({"shape": [0, 96]}, "has no valid shape and data_offsets"),
        ({"shape": [4.0, 96]}, "has no valid shape and data_offsets"),
        ({"shape": [1] * 1000}, "has no valid shape and data_offsets"),
        ({"shape": [4, 95]}, "has 1536 bytes, which do not match the shape [4, 95] of F32"),
        ({"data_offsets": [-8, 1528]}, "has no valid shape and data_offsets"),
        ({"data_offsets": [0, 8]}, "has 8 bytes, which do not match the shape [4, 96] of F32"),
        ({"dtype": "I64"}, "holds I64, expected F16, BF16, F32, F64"),
        ({"dtype": None}, "holds None, expected"),
        ({"dtype": ["F32"]}, "expected F16"),
        ({"data_offsets": [10**9, 10**9 + 1536]}, "perhaps half downloaded"),
    ],
    ids=str,
)
def test_a_header_that_describes_what_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    shapes = unet()
    write(tmp_path / "bad.safetensors", shapes, changes={next(iter(shapes)): change})
    assert told in reason(tmp_path)


def test_a_file_that_is_cut_off_is_refused_with_both_lengths(tmp_path: Path) -> None:
    file = write(tmp_path / "bad.safetensors", unet())
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert reason(tmp_path) == f"has {len(content) - 1} bytes, {len(content)} are expected, perhaps half downloaded"
    file.write_bytes(content[:50])
    assert reason(tmp_path) == NO_SAFETENSORS


def test_a_file_that_needs_too_much_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stable_diffusion.models.loras.MAX_LORA_BYTES", 1000)
    write(tmp_path / "bad.safetensors", unet(), dtype="F16")
    assert "as float32, at most" in reason(tmp_path)


def test_a_link_that_leads_out_of_the_folder_is_refused_and_one_inside_is_not(tmp_path: Path) -> None:
    outside = write(tmp_path / "secret" / "outside.safetensors", unet())
    folder = tmp_path / "loras"
    write(folder / "inside.safetensors", unet())
    (folder / "bad.safetensors").symlink_to(outside)
    (folder / "good.safetensors").symlink_to(folder / "inside.safetensors")
    (folder / "dangling.safetensors").symlink_to(folder / "nowhere")
    loras = LoraFolder(folder, MODEL).look()
    assert sorted(loras.files) == ["good", "inside"]
    assert loras.refused == {"bad.safetensors": "is a link out of the folder", "dangling.safetensors": "missing"}


def test_a_folder_that_is_itself_a_link_is_served(tmp_path: Path) -> None:
    write(tmp_path / "real" / "one.safetensors", unet())
    (tmp_path / "loras").symlink_to(tmp_path / "real")
    assert only(tmp_path / "loras").name == "one"


def test_what_has_the_name_of_a_file_and_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").mkdir()
    assert reason(tmp_path) == "missing"
    (tmp_path / "bad.safetensors").rmdir()
    os.mkfifo(tmp_path / "bad.safetensors")
    assert reason(tmp_path) == "missing", "a pipe is not waited for"


def test_of_two_files_with_one_name_the_second_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a" / "bad.safetensors", unet())
    write(tmp_path / "b" / "bad.safetensors", unet())
    loras = LoraFolder(tmp_path, MODEL).look()
    assert loras.files["bad"].path == tmp_path / "a" / "bad.safetensors"
    assert loras.refused == {"bad.safetensors": "another file has this name, bad.safetensors"}


def test_files_that_come_change_and_go_are_noticed_and_others_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = LoraFolder(tmp_path, MODEL)
    write(tmp_path / "one.safetensors", unet())
    first = folder.look()
    assert folder.look() is first, "nothing has changed"
    write(tmp_path / "two.safetensors", unet())
    assert sorted(folder.look().files) == ["one", "two"]
    before = folder.look().files["one"].hash
    write(tmp_path / "one.safetensors", unet(), fill=b"x")
    os.utime(tmp_path / "one.safetensors", ns=(1, 1))
    assert folder.look().files["one"].hash != before
    shutil.move(tmp_path / "two.safetensors", tmp_path / "three.safetensors")
    assert sorted(folder.look().files) == ["one", "three"]
    (tmp_path / "three.safetensors").write_bytes(b"cut")
    assert folder.look().refused == {"three.safetensors": NO_SAFETENSORS}
    (tmp_path / "three.safetensors").unlink()
    assert sorted(folder.look().files) == ["one"]


def test_a_lora_is_found_by_name_or_alias_and_the_name_comes_first(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", unet(), metadata={"ss_output_name": "b"})
    write(tmp_path / "b.safetensors", unet(), metadata={"ss_output_name": "Pretty name"})
    loras = LoraFolder(tmp_path, MODEL).look()
    assert [loras.named(name).name for name in ("a", "b", "Pretty name")] == ["a", "b", "b"]


@pytest.mark.parametrize("name", ["", "../a", "/etc/passwd", "a.safetensors", "A", "sub/a", "a\0", "x" * 10_000])
def test_a_name_that_is_not_in_the_list_is_refused_with_the_list(tmp_path: Path, name: str) -> None:
    write(tmp_path / "loras" / "sub" / "a.safetensors", unet())
    write(tmp_path / "a.safetensors", unet())
    with pytest.raises(LoraNotFound, match="here, this server has: a$") as caught:
        LoraFolder(tmp_path / "loras", MODEL).look().named(name)
    assert caught.value.status == 422
    assert caught.value.problems[0].field == "loras"
    assert len(caught.value.message) < 200


def test_a_server_without_loras_says_so(tmp_path: Path) -> None:
    with pytest.raises(LoraNotFound, match="there is no LoRA 'x' here, this server has: none"):
        LoraFolder(tmp_path, MODEL).look().named("x")


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    for number in range(35):
        write(tmp_path / f"style{number:02}.safetensors", unet())
    with pytest.raises(LoraNotFound, match=r"style00, .*, style29 and 5 more$"):
        LoraFolder(tmp_path, MODEL).look().named("x")


def test_a_name_whose_file_is_refused_says_why(tmp_path: Path) -> None:
    write(tmp_path / "bad.safetensors", unet({"hada_w1_a": (4, 4)}))
    with pytest.raises(LoraNotFound, match="loras: 'bad' cannot be used: it is a LoHa, which is not supported"):
        LoraFolder(tmp_path, MODEL).look().named("bad")


def test_a_name_whose_file_is_a_pickle_says_why(tmp_path: Path) -> None:
    (tmp_path / "b2.ckpt").write_bytes(b"a pickle")
    with pytest.raises(LoraNotFound, match="loras: 'b2' cannot be used: a pickle can run code when it is loaded, only safetensors"):
        LoraFolder(tmp_path, MODEL).look().named("b2")
