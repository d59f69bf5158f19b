"""The textual inversions that a server offers: which files its folder has, and whether each fits the model's text encoder.

Reads file headers only, without torch. `engine/loading.py` loads the vectors, once, at start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stable_diffusion.core.errors import ModelFolderError
from stable_diffusion.models.folder import ModelFolder
from stable_diffusion.models.safetensors import check_safetensors, fault_of, read_tensor_list

MAX_VECTORS = 75  # as many tokens as a chunk has
_PICKLES = (".pt", ".bin", ".pth")


@dataclass(frozen=True)
class TextualInversion:
    """A checked file. `tensors` has one name for each text encoder; shapes are (vectors, width), or (width) for one vector."""

    path: Path
    name: str  # by which prompts refer to it
    tensors: tuple[str, ...]
    vectors: int
    width: int  # of the first text encoder's vectors


@dataclass(frozen=True)
class TextualInversions:
    """The files of a folder by name, and why others are refused."""

    files: Mapping[str, TextualInversion]
    refused: Mapping[str, str]


def read_embeddings(model: ModelFolder) -> TextualInversions:
    """Read the model's folder of textual inversions, which need not exist."""
    found: dict[str, TextualInversion] = {}
    refused: dict[str, str] = {}
    widths = [int(model.config(component).get("hidden_size", 0)) for component in model.text_encoders]
    for file in sorted(model.embeddings.rglob("*")):
        if file.suffix.lower() not in (".safetensors", *_PICKLES):
            continue
        try:
            if file.stem in found:
                raise ValueError("another file has this name")
            if not file.resolve().is_relative_to(model.embeddings.resolve()):
                raise ValueError("is a link out of the folder")
            found[file.stem] = _checked(file, widths)
        except (ValueError, ModelFolderError) as error:
            refused[file.name] = str(error).removeprefix(f"{file}: ")
        except OSError:
            refused[file.name] = "cannot be read"
    return TextualInversions(found, refused)


def _checked(file: Path, widths: Sequence[int]) -> TextualInversion:
    if file.suffix.lower() in _PICKLES:
        raise ValueError("a pickle can run code when it is loaded, only safetensors are served")
    check_safetensors(file)
    tensors, _ = read_tensor_list(file)
    is_for_xl = set(tensors) >= {"clip_l", "clip_g"}
    if is_for_xl != (len(widths) > 1):
        raise ValueError(f"it is {'' if is_for_xl else 'not '}for Stable Diffusion XL")
    for name, tensor in tensors.items():
        if (fault := fault_of(tensor)) is not None:
            raise ValueError(f"{name[:80]!r} {fault}")
    names = ("clip_l", "clip_g") if is_for_xl else ("emb_params",) if "emb_params" in tensors else tuple(tensors)
    shapes = [tensors[name]["shape"] for name in names]
    if len(names) != len(widths) or not all(1 <= len(shape) <= 2 for shape in shapes):
        raise ValueError("it is not a textual inversion")
    for shape, width in zip(shapes, widths, strict=True):
        if shape[-1] != width:
            raise ValueError(f"its vectors have {shape[-1]} values, the model's text encoder has {width}: it is for another kind of model")
    counts = {shape[0] if len(shape) == 2 else 1 for shape in shapes}
    vectors = max(counts)
    if len(counts) > 1 or not 1 <= vectors <= MAX_VECTORS:
        raise ValueError(f"it has {' and '.join(map(str, sorted(counts)))} vectors, at most {MAX_VECTORS} fit into a prompt")
    return TextualInversion(file, file.stem, names, vectors, widths[0])
