"""Stable Diffusion checkpoints in one .safetensors file: of which kind a file is, and whether it has all that its kind needs.

Decides by the header's names and shapes, never by the file's name. Reads headers and samples, without torch. The configuration of each
kind is in `kinds/`; `engine/loading.py` loads the weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from stable_diffusion.core.errors import ModelFolderError
from stable_diffusion.models.ldm_names import UNET_PREFIX, VAE_PREFIX, Tensor, has_clip_without_text_model, tensors_of
from stable_diffusion.models.safetensors import SAMPLE_BYTES, VALUE_BYTES, check_safetensors, fault_of, read_tensor_list

PredictionType = Literal["epsilon", "v_prediction"]

SUFFIX = ".safetensors"  # with another one, diffusers would read the file as a pickle
KINDS_FOLDER = Path(__file__).parent / "kinds"
_COMPONENTS = {"unet": "UNet", "vae": "autoencoder (VAE)", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
_QUOTED_CHARACTERS = 80  # of a tensor's name, in messages


@dataclass(frozen=True)
class Kind:
    """A kind of model. `folder` has its configuration, as diffusers' folders have it."""

    title: str
    folder: Path

    def config(self, component: str) -> dict[str, Any]:
        return _config(self.folder, component)

    @property
    def prediction_type(self) -> str:
        scheduler = json.loads((self.folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        return str(scheduler.get("prediction_type", "epsilon"))


# Of kinds with equal tensors, the first is taken where neither the operator nor a marker says the prediction type.
KINDS = (
    Kind("Stable Diffusion 1.x", KINDS_FOLDER / "sd1"),
    Kind("Stable Diffusion 1.x for inpainting", KINDS_FOLDER / "sd1-inpainting"),
    Kind("Stable Diffusion 2.x", KINDS_FOLDER / "sd2"),
    Kind("Stable Diffusion 2.x", KINDS_FOLDER / "sd2-base"),
    Kind("Stable Diffusion 2.x for inpainting", KINDS_FOLDER / "sd2-inpainting"),
    Kind("Stable Diffusion XL", KINDS_FOLDER / "sdxl"),
    Kind("Stable Diffusion XL for inpainting", KINDS_FOLDER / "sdxl-inpainting"),
    Kind("the demo XL model", KINDS_FOLDER.parents[1] / "demo" / "model_xl"),
    Kind("the demo model", KINDS_FOLDER.parents[1] / "demo" / "model"),
)


@dataclass(frozen=True)
class SingleFile:
    """A checked file. `scheduler_changes`: what its noise scheduler's configuration has instead of its kind's."""

    path: Path
    kind: Kind
    scheduler_changes: tuple[tuple[str, str | bool], ...]
    is_prediction_type_unknown: bool  # the header cannot show it; the loaded model can


def read_single_file(
    file: Path, prediction_type: PredictionType | None = None, kinds: Sequence[Kind] = KINDS, *, needs_vae: bool = True
) -> SingleFile:
    """Check that `file` is a whole checkpoint of one of `kinds`. Raises ModelFolderError, which says what else it is.

    `prediction_type`: as the operator says it. `needs_vae`: whether the file's own autoencoder is used.
    """
    tensors = read_tensors(file)
    if (other := _other_kind(tensors)) is not None:
        raise ModelFolderError(f"{file}: {other}; {_allowed(kinds)}")
    shape = _unet_shape({name: _shape(tensor) for name, tensor in tensors.items()})
    matching = [kind for kind in kinds if _unet_shape_of(kind) == shape]
    if not matching:
        raise ModelFolderError(f"{file}: {shape.described()}; {_allowed(kinds)}")
    chosen = next((kind for kind in matching if kind.prediction_type == prediction_type), matching[0])
    _check_tensors(file, chosen, tensors, needs_vae=needs_vae)
    stated = prediction_type or ("v_prediction" if "v_pred" in tensors else None)
    changes: dict[str, str | bool] = {}
    if stated is not None and stated != chosen.prediction_type:
        changes["prediction_type"] = stated
    if "ztsnr" in tensors:  # with such noise the last timestep counts, which only this spacing visits (Lin et al. 2023)
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return SingleFile(file, chosen, tuple(changes.items()), stated is None and len(matching) > 1)


def shapes_of(file: Path, folder: Path, component: str) -> dict[str, list[int]]:
    """The shapes of a component's tensors by the names in diffusers' folders. `folder`: its kind's."""
    return {tensor.name: list(tensor.shape) for tensor in _tensors(file, folder, component)}


def renamed_text_encoder(file: Path, folder: Path) -> dict[str, str] | None:
    """The names in the file by those in transformers' text encoder, if diffusers' loader does not know them."""
    if not has_clip_without_text_model(read_tensor_list(file)[0]):
        return None
    return {tensor.name: tensor.source for tensor in _tensors(file, folder, "text_encoder")}


def samples_of_component(file: Path, folder: Path, component: str) -> Iterator[tuple[str, bytes]]:
    """As `samples_of` for this component's file in a folder of diffusers: name, dtype and shape of each tensor, and its middle."""
    return samples_of_tensors(file, _tensors(file, folder, component))


def samples_of_tensors(file: Path, tensors: Sequence[Tensor]) -> Iterator[tuple[str, bytes]]:
    """As `samples_of_component`, of these tensors."""
    header, header_bytes = read_tensor_list(file)
    data_start = 8 + header_bytes
    with file.open("rb") as stream:

        def read(start: int, length: int) -> bytes:
            stream.seek(data_start + start)
            return stream.read(length)

        for tensor in tensors:
            found = header[tensor.source]
            yield f"{tensor.name} {found['dtype']} {list(tensor.shape)}", _middle(tensor, found, read)


def _middle(tensor: Tensor, found: Mapping[str, Any], read: Callable[[int, int], bytes]) -> bytes:
    start, end = found["data_offsets"]
    if tensor.form == "transposed":
        content, value = read(start, end - start), VALUE_BYTES[found["dtype"]]
        rows, columns = tensor.shape
        length = min(end - start, SAMPLE_BYTES)
        first = (end - start - length) // 2 // value
        places = [((index % columns) * rows + index // columns) * value for index in range(first, first + length // value)]
        return b"".join(content[place : place + value] for place in places)
    if tensor.form.endswith("third"):
        third = (end - start) // 3
        start += third * ("first third", "second third", "last third").index(tensor.form)
        end = start + third
    length = min(end - start, SAMPLE_BYTES)
    return read(start + (end - start - length) // 2, length)


def _tensors(file: Path, folder: Path, component: str) -> list[Tensor]:
    return tensors_of(component, _config(folder, component), read_tensor_list(file)[0])


def _config(folder: Path, component: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / component / "config.json").read_text(encoding="utf-8"))
    return config


# What a file that is no safetensors file begins with.
_BEGINNINGS = {
    b"PK\x03\x04": "a pickle in a ZIP archive, as torch.save writes it, which can run code when it is loaded",
    b"\x80\x02": "a pickle, which can run code when it is loaded",
    b"\x80\x03": "a pickle, which can run code when it is loaded",
    b"\x80\x04": "a pickle, which can run code when it is loaded",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a Git LFS pointer, whose file has not been downloaded",
    b"<": "a web page or XML, perhaps a download that asked to log in",
}


def read_tensors(file: Path) -> dict[str, Any]:
    """The header's description of each tensor by name. Raises ModelFolderError, which says what `file` is if it is no safetensors file."""
    if not file.is_file():
        raise ModelFolderError(f"{file}: missing")
    with file.open("rb") as stream:
        beginning = stream.read(32)
    for mark, meaning in _BEGINNINGS.items():
        if beginning.startswith(mark):
            raise ModelFolderError(f"{file}: {meaning}; expected a safetensors file")
    if file.suffix != SUFFIX:
        raise ModelFolderError(f"{file}: a model in one file must have a name that ends in {SUFFIX}")
    check_safetensors(file)
    try:
        with safe_open(file, framework="numpy"):  # reads the header with the library's own rules
            pass
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(f"{file}: not a valid safetensors file ({error})") from None
    return read_tensor_list(file)[0]


def _any_begins(*beginnings: str) -> Callable[[Iterable[str]], bool]:
    return lambda names: any(name.startswith(beginnings) for name in names)


def _any_has(*parts: str) -> Callable[[Iterable[str]], bool]:
    return lambda names: any(part in name for name in names for part in parts)


# Signs of what is not served, before a UNet is looked for: the first that applies is said.
_OTHERS: tuple[tuple[Callable[[Iterable[str]], bool], str], ...] = (
    (_any_begins("control_model.", "controlnet_", "input_hint_block.", "zero_convs."), "a ControlNet, not a whole model"),
    (_any_begins("lora_unet_", "lora_te", "lora_transformer_", "lycoris_"), "a LoRA, not a whole model: put it into the folder loras"),
    (_any_has(".lora_A.", ".lora_B.", ".lora.down.", ".lora.up.", "lora_down", "lora_up", "_lora."), "a LoRA, not a whole model"),
    (_any_has(".hada_w", ".lokr_w", ".oft_"), "a LyCORIS adapter, not a whole model"),
    (_any_has("motion_modules."), "a motion module or a video model (AnimateDiff)"),
    (_any_begins("ip_adapter.", "image_proj."), "an IP-Adapter, not a whole model"),
    (_any_has("joint_blocks."), "a Stable Diffusion 3 model"),
    (_any_has("double_blocks.", "single_transformer_blocks."), "a Flux model, or another diffusion transformer"),
    (_any_begins("conditioner.embedders.0.model."), "a Stable Diffusion XL refiner"),
    (_any_begins("edm_mean", "edm_std"), "a model with EDM's noise (Playground 2.5)"),
    (_any_begins("edm_vpred."), "a model with EDM's noise and v-prediction (CosXL)"),
)
# The same, where there is no UNet.
_OTHERS_WITHOUT_UNET: tuple[tuple[Callable[[Iterable[str]], bool], str], ...] = (
    (_any_begins("emb_params", "string_to_param", "clip_l", "clip_g"), "a textual inversion, not a whole model"),
    (_any_begins(VAE_PREFIX, "encoder.conv_in.", "decoder.conv_in.", "encoder.down"), "an autoencoder (VAE) alone, not a whole model"),
    (_any_begins("text_model.", "cond_stage_model.", "conditioner."), "a text encoder alone, not a whole model"),
    (_any_begins("embeddings.token_embedding.", "text_projection"), "a text encoder alone, not a whole model"),
    (_any_begins("vision_model."), "an image encoder, not a whole model"),
    (_any_begins("down_blocks.", "conv_in."), "one component of a diffusers folder: name the whole folder"),
    (_any_begins("input_blocks.", "model_ema."), "a UNet alone, not a whole model"),
    (_any_has("transformer_blocks.", "t_embedder.", "x_embedder."), "a diffusion transformer"),
)


def _other_kind(tensors: Mapping[str, Any]) -> str | None:
    has_unet = any(name.startswith(UNET_PREFIX) for name in tensors)
    if len(tensors) == 1 and not has_unet:
        return "a textual inversion or another single tensor, not a whole model"
    signs = _OTHERS if has_unet else (*_OTHERS, *_OTHERS_WITHOUT_UNET)
    found = next((f"it is {meaning}" for applies, meaning in signs if applies(tensors)), None)
    if found is None and _FIRST not in tensors:
        return f"it is not a Stable Diffusion checkpoint: there is no {_FIRST}"
    return found


_FIRST = f"{UNET_PREFIX}input_blocks.0.0.weight"
_OTHER_INPUTS = {5: "a depth-to-image model", 7: "an upscaler", 8: "an InstructPix2Pix model"}


@dataclass(frozen=True)
class _UNetShape:
    """By what kinds differ: the shape of the first convolution, the widths of the texts, and whether there are further conditions."""

    first: tuple[int, ...]
    text_widths: frozenset[int]
    is_conditioned: bool

    def described(self) -> str:
        if len(self.first) != 4:
            return f"{_FIRST} has shape {list(self.first)}, which no Stable Diffusion model has"
        if self.first[1] in _OTHER_INPUTS:
            return f"it is {_OTHER_INPUTS[self.first[1]]}: its UNet has {self.first[1]} input channels"
        widths = ", ".join(str(width) for width in sorted(self.text_widths)) or "none"
        more = " and takes further conditions" if self.is_conditioned else ""
        return f"its UNet has {self.first[1]} input channels, {self.first[0]} channels in its first layer, texts of width {widths}{more}"


def _unet_shape(shapes: Mapping[str, tuple[int, ...]]) -> _UNetShape:
    within = {name: shape for name, shape in shapes.items() if name.startswith(UNET_PREFIX)}
    widths = {shape[1] for name, shape in within.items() if name.endswith("attn2.to_k.weight") and len(shape) == 2}
    is_conditioned = any(name.startswith(f"{UNET_PREFIX}label_emb.") for name in within)
    return _UNetShape(within.get(_FIRST, ()), frozenset(widths), is_conditioned)


def _unet_shape_of(kind: Kind) -> _UNetShape:
    return _unet_shape({tensor.source: tensor.shape for tensor in tensors_of("unet", kind.config("unet"), ())})


def _shape(tensor: Any) -> tuple[int, ...]:
    shape = tensor.get("shape")
    return tuple(shape) if isinstance(shape, list) and all(type(side) is int for side in shape) else ()


def _allowed(kinds: Sequence[Kind]) -> str:
    return f"expected {' or '.join(dict.fromkeys(kind.title for kind in kinds))}"


def _needed(kind: Kind, tensors: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    return {
        component: tensors_of(component, kind.config(component), tensors)
        for component in _COMPONENTS
        if (kind.folder / component / "config.json").is_file()
    }


def _check_tensors(file: Path, kind: Kind, tensors: Mapping[str, Any], *, needs_vae: bool) -> None:
    needed = _needed(kind, tensors)
    for component, parts in needed.items():
        if component != "vae" or needs_vae:
            require_tensors(file, kind.title, component, parts, tensors)
    known = {part.source for part in needed["unet"]}
    if surplus := [name for name in tensors if name.startswith(UNET_PREFIX) and name not in known]:
        quoted = repr(surplus[0][:_QUOTED_CHARACTERS])
        raise ModelFolderError(f"{file}: its UNet has {quoted}{_and_more(surplus)}, which {kind.title} has not: {_MIXED}")
    if any(name.startswith("vae.") for name in tensors):
        raise ModelFolderError(f"{file}: it holds two autoencoders, {VAE_PREFIX}* and vae.*: {_MIXED}")


_MIXED = "the file is mixed from several models, or of a kind that is not served"


def require_tensors(file: Path, title: str, component: str, parts: Sequence[Tensor], tensors: Mapping[str, Any]) -> None:
    """Hold a header against what a component of the model `title` needs. Raises ModelFolderError."""
    sources = list(dict.fromkeys(part.source for part in parts))
    missing = [source for source in sources if source not in tensors]
    if len(missing) == len(sources):
        raise ModelFolderError(f"{file}: its {_COMPONENTS[component]} is missing: there is no {missing[0]} there; expected {title}, whole")
    if missing:
        raise ModelFolderError(
            f"{file}: {missing[0]}{_and_more(missing)} of its {_COMPONENTS[component]} are missing, expected {title}: "
            "the file is cut, or mixed from several models"
        )
    for part in parts:
        found = tensors[part.source]
        if (fault := fault_of(found)) is not None:
            raise ModelFolderError(f"{file}: {part.source} {fault}")
        if tuple(found["shape"]) not in part.file_shapes:
            raise ModelFolderError(
                f"{file}: {part.source} has shape {found['shape']}, {title} has {list(part.file_shapes[0])} there: {_MIXED}"
            )


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
