"""The LoRA files that a server offers: which files its folder has, whether each fits the model, and which tensors change which layer.

Reads file headers only, without torch. `engine/lora_store.py` loads the tensors.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_diffusion.core.errors import LoraNotFound, ModelFolderError
from stable_diffusion.core.limits import MAX_LORA_BYTES
from stable_diffusion.models.folder import ModelFolder
from stable_diffusion.models.lora_names import (
    COMPONENTS,
    Component,
    Layer,
    Part,
    UNetShape,
    is_for_xl,
    kind_of_other,
    layers_by_name,
    split,
)
from stable_diffusion.models.safetensors import check_safetensors, fault_of, read_metadata, read_tensor_list

HASH_DIGITS = 12  # as A1111 writes them
_MAX_HEADER_BYTES = 8 * 2**20  # trainers write up to some megabytes about their data
_PICKLES = (".pt", ".bin", ".ckpt", ".pth", ".pkl")
_MAX_RANK = 1024
_MAX_LISTED = 30


class LoraError(ValueError):
    """Why a file cannot be served."""


@dataclass(frozen=True)
class LayerChange:
    """The names of the tensors that change one layer, and the shapes that they have there; `alpha` is None where the file has none."""

    down: str
    up: str
    alpha: str | None
    down_shape: tuple[int, ...]  # (rank, in) or (rank, in, height, width)
    up_shape: tuple[int, ...]  # (out, rank) or (out, rank, 1, 1)


@dataclass(frozen=True)
class LoraFile:
    """A checked file. `layers` has the changes by component and layer."""

    path: Path
    name: str
    alias: str  # as its training named it, else `name`
    metadata: Mapping[str, str]
    layers: Mapping[Component, Mapping[str, LayerChange]]
    size_bytes: int  # of its values as float32
    header_bytes: int

    @functools.cached_property
    def hash(self) -> str:
        """Twelve hexadecimal digits, as A1111 writes them: of a SHA-256 over what follows the file's header. Reads the whole file."""
        digest = hashlib.sha256()
        with self.path.open("rb") as stream:
            stream.seek(8 + self.header_bytes)
            while piece := stream.read(2**20):
                digest.update(piece)
        return digest.hexdigest()[:HASH_DIGITS]


@dataclass(frozen=True)
class Loras:
    """The files of a folder by name, and why others are refused."""

    files: Mapping[str, LoraFile]
    refused: Mapping[str, str]

    def named(self, name: str) -> LoraFile:
        """The file of this name or alias. Raises LoraNotFound, which lists the names or says why a file is refused."""
        found = self.files.get(name) or next((file for file in self.files.values() if file.alias == name), None)
        if found is not None:
            return found
        reasons = [reason for file, reason in self.refused.items() if Path(file).stem == name]
        if (reason := self.refused.get(f"{name}.safetensors") or next(iter(reasons), None)) is not None:
            raise LoraNotFound(f"loras: {name[:60]!r} cannot be used: {reason}", field="loras")
        names = ", ".join(list(self.files)[:_MAX_LISTED]) or "none"
        more = f" and {len(self.files) - _MAX_LISTED} more" if len(self.files) > _MAX_LISTED else ""
        raise LoraNotFound(f"loras: there is no LoRA {name[:60]!r} here, this server has: {names}{more}", field="loras")


class LoraFolder:
    """The folder of a server's LoRAs. It need not exist. Files may come and go; each call of `look` notices it."""

    def __init__(self, path: Path, model: ModelFolder) -> None:
        self._path = path
        self._model = model
        self._seen: tuple[object, ...] | None = None
        self._loras = Loras({}, {})

    def look(self) -> Loras:
        """The files that are in the folder now. Headers are read again only if a file has changed."""
        files = sorted(file for file in self._path.rglob("*") if file.suffix.lower() in (".safetensors", *_PICKLES))
        seen = tuple((file, *_state(file)) for file in files)
        if seen != self._seen:
            self._loras = self._read(files)
            self._seen = seen
        return self._loras

    def _read(self, files: list[Path]) -> Loras:
        found: dict[str, LoraFile] = {}
        refused: dict[str, str] = {}
        for file in files:
            try:
                if file.stem in found:
                    raise LoraError(f"another file has this name, {found[file.stem].path.name}")
                if not file.resolve().is_relative_to(self._path.resolve()):
                    raise LoraError("is a link out of the folder")
                found[file.stem] = check_lora(file, self._model)
            except (LoraError, OSError) as error:
                refused[file.name] = str(error) if isinstance(error, LoraError) else "cannot be read"
        return Loras(found, refused)


def _state(file: Path) -> tuple[int, ...]:
    """Values that change with the file's content; empty if the file has just been deleted."""
    try:
        stat = file.stat()
    except OSError:
        return ()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def check_lora(file: Path, model: ModelFolder) -> LoraFile:
    """Compare a file's header with the layers of `model`. Raises LoraError, which says why the file cannot be served."""
    if file.suffix.lower() in _PICKLES:
        raise LoraError("a pickle can run code when it is loaded, only safetensors are served")
    try:
        check_safetensors(file)
    except ModelFolderError as error:
        raise LoraError(str(error).removeprefix(f"{file}: ")) from None
    tensors, header_bytes = read_tensor_list(file)
    if header_bytes > _MAX_HEADER_BYTES:
        raise LoraError(f"its header has {header_bytes} bytes, at most {_MAX_HEADER_BYTES} are read")
    if (kind := kind_of_other(list(tensors))) is not None:
        raise LoraError(f"it is {kind}, which is not supported")
    if is_for_xl(list(tensors)) and not model.is_xl:
        raise LoraError("it is a LoRA for Stable Diffusion XL, which the model is not")
    for name, tensor in tensors.items():
        if (fault := fault_of(tensor)) is not None:
            raise LoraError(f"{name[:80]!r} {fault}")
    shapes = model_layers(model)
    layers: dict[Component, dict[str, LayerChange]] = {component: {} for component in COMPONENTS}
    for (component, layer), parts in _by_layer(tensors, _known_names(model)).items():
        if "down" not in parts or "up" not in parts:
            raise LoraError(f"{layer}: {'down' if 'up' in parts else 'up'} is missing")
        down, up, weight = tensors[parts["down"]]["shape"], tensors[parts["up"]]["shape"], shapes[component][layer]
        _require_fitting(layer, down, up, weight)
        alpha = parts.get("alpha")
        if alpha is not None and math.prod(tensors[alpha]["shape"]) != 1:
            raise LoraError(f"{alpha[:80]!r} is not one number")
        down_shape, up_shape = (down[0], *weight[1:]), (weight[0], down[0], *[1] * (len(weight) - 2))
        layers[component][layer] = LayerChange(parts["down"], parts["up"], alpha, down_shape, up_shape)
    if not any(layers.values()):
        raise LoraError("it holds no LoRA")
    metadata = read_metadata(file)
    alias = metadata.get("ss_output_name") or file.stem
    changes = [change for part in layers.values() for change in part.values()]
    size_bytes = sum(4 * (math.prod(change.down_shape) + math.prod(change.up_shape)) for change in changes)
    if size_bytes > MAX_LORA_BYTES:
        raise LoraError(f"it takes {size_bytes // 2**20} MiB as float32, at most {MAX_LORA_BYTES // 2**20} are served")
    return LoraFile(file, file.stem, alias, metadata, layers, size_bytes, header_bytes)


def _by_layer(tensors: Mapping[str, Any], known: Mapping[str, Layer]) -> dict[Layer, dict[Part, str]]:
    found: dict[Layer, dict[Part, str]] = {}
    for name in tensors:
        parts = split(name)
        if parts is None:
            raise LoraError(f"it holds {name[:80]!r}, which is not part of a LoRA")
        layer = known.get(parts[0])
        if layer is None:
            raise LoraError(f"{parts[0][:80]!r} is not a layer of the model: it is for another kind of model")
        if parts[1] in found.setdefault(layer, {}):
            raise LoraError(f"it changes {layer[1]} twice, by {found[layer][parts[1]][:80]!r} and {name[:80]!r}")
        found[layer][parts[1]] = name
    return found


def _require_fitting(layer: str, down: list[int], up: list[int], weight: list[int]) -> None:
    """Shapes: down (rank, in, ...) with the layer's kernel, up (out, rank, 1, ...). A 1x1 convolution may be written as a linear layer."""
    rank = down[0] if down else 0
    if not (1 <= rank <= _MAX_RANK and len(up) > 1 and up[1] == rank):
        raise LoraError(f"{layer}: shapes {down} and {up} do not match")
    expected = [rank, *weight[1:]]
    if _squeezed(down) != _squeezed(expected) or up[0] != weight[0] or any(side != 1 for side in up[2:]):
        raise LoraError(
            f"{layer}: it changes {up[0]} x {down[1] if len(down) > 1 else 0} values, the model has {weight[0]} x {weight[1]}: "
            "it is for another kind of model"
        )


def _squeezed(shape: list[int]) -> list[int]:
    return shape[:2] if all(side == 1 for side in shape[2:]) else shape


@functools.lru_cache(maxsize=4)
def model_layers(model: ModelFolder) -> Mapping[Component, Mapping[str, list[int]]]:
    """The weights' shapes of all linear and convolution layers."""
    return {
        component: {
            name.removesuffix(".weight"): shape
            for name, shape in _shapes(model, component)
            if name.endswith(".weight") and len(shape) in (2, 4) and name.split(".")[0] not in ("embeddings", "text_projection")
        }
        for component in COMPONENTS
    }


def _shapes(model: ModelFolder, component: Component) -> list[tuple[str, list[int]]]:
    if component not in ("unet", *model.text_encoders):
        return []
    return [(name.removeprefix("text_model."), shape) for name, shape in model.weight_shapes(component).items()]


@functools.lru_cache(maxsize=4)
def _known_names(model: ModelFolder) -> Mapping[str, Layer]:
    layers = model_layers(model)
    config = model.config("unet")
    with_attention = frozenset(index for index, kind in enumerate(config.get("up_block_types", ())) if "CrossAttn" in kind)
    shape = UNetShape(int(config.get("layers_per_block", 2)), with_attention)
    return layers_by_name({component: list(found) for component, found in layers.items()}, shape)
