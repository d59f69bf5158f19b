"""The names that LoRA files have for the layers of a model: diffusers' and kohya's, the latter in two spellings of the UNet.

Knows no files. Layer names are those of diffusers' UNet and of transformers' CLIP text encoder, without a leading `text_model.`
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Component = Literal["unet", "text_encoder", "text_encoder_2"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
Part = Literal["down", "up", "alpha"]
Layer = tuple[Component, str]

_PARTS: dict[str, Part] = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "alpha": "alpha",
}
_OF_PROCESSORS = re.compile(r"\.processor\.(?P<layer>to_q|to_k|to_v|to_out)_lora\.")  # diffusers' first format
_KIND_BY_MARK = {
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "oft_": "an OFT adapter",
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "lora_mid": "a LoCon in CP decomposition",
    "double_blocks": "a LoRA for Flux",
    "transformer.": "a LoRA for a diffusion transformer",
    "lora_transformer_": "a LoRA for a diffusion transformer",
    "joint_blocks": "a LoRA for Stable Diffusion 3",
    "emb_params": "a textual inversion",
    "string_to_param": "a textual inversion",
    "model.diffusion_model.": "a checkpoint",
    "ip_adapter": "an IP-Adapter",
}


@dataclass(frozen=True)
class UNetShape:
    """The facts on which layer names in kohya's second spelling depend."""

    layers_per_block: int
    up_blocks_with_attention: frozenset[int]


def kind_of_other(names: list[str]) -> str | None:
    """The kind of a file with tensors of these `names`, if it is known and not a LoRA that can be served."""
    joined = "\n".join(names)
    return next((kind for mark, kind in _KIND_BY_MARK.items() if mark in joined), None)


def is_for_xl(names: list[str]) -> bool:
    """Whether tensors of these `names` change a second text encoder, which only Stable Diffusion XL has."""
    return any(name.startswith(("lora_te2_", "text_encoder_2.")) for name in names)


def layers_by_name(layers: Mapping[Component, list[str]], shape: UNetShape) -> Mapping[str, Layer]:
    """Every spelling of each layer's name in a LoRA file, from the layers of a model's components."""
    known: dict[str, Layer] = {}
    is_xl = bool(layers.get("text_encoder_2"))
    for layer in layers["unet"]:
        found: Layer = ("unet", layer)
        known |= dict.fromkeys((layer, f"unet.{layer}", _kohya("lora_unet", layer)), found)
        if (original := _original_name(layer, shape)) is not None:
            known[_kohya("lora_unet", original)] = found
    prefixes: dict[Component, tuple[str, ...]] = {"text_encoder": ("lora_te1",) if is_xl else ("lora_te", "lora_te1")}
    prefixes["text_encoder_2"] = ("lora_te2",)
    for component, kohya_prefixes in prefixes.items():
        for layer in layers.get(component, []):
            full = f"text_model.{layer}"
            spellings = (f"{component}.{full}", f"{component}.{layer}", *(_kohya(prefix, full) for prefix in kohya_prefixes))
            known |= dict.fromkeys(spellings, (component, layer))
    return known


def split(tensor: str) -> tuple[str, Part] | None:
    """A tensor's name as that of its layer and its part of the change. None if it is not a LoRA's."""
    tensor = tensor.removeprefix("base_model.model.")
    tensor = _OF_PROCESSORS.sub(lambda match: f".{_with_index(match['layer'])}.lora.", tensor)
    for ending, part in _PARTS.items():
        if tensor.endswith(f".{ending}"):
            return tensor.removesuffix(f".{ending}"), part
    return None


def _with_index(layer: str) -> str:
    return "to_out.0" if layer == "to_out" else layer


def _kohya(prefix: str, layer: str) -> str:
    return f"{prefix}_{layer.replace('.', '_')}"


_IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_IN_BLOCK = re.compile(
    r"(?P<side>down|up)_blocks\.(?P<block>\d+)\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<index>\d+)\.(?P<rest>.+)"
)
_IN_MIDDLE = re.compile(r"mid_block\.(?P<kind>resnets|attentions)\.(?P<index>\d+)\.(?P<rest>.+)")


def _original_name(layer: str, shape: UNetShape) -> str | None:
    """The layer's name in CompVis' UNet (openaimodel.py of latent-diffusion), which numbers its blocks consecutively."""
    if layer in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[layer]
    if middle := _IN_MIDDLE.fullmatch(layer):
        is_resnet = middle["kind"] == "resnets"
        place = 2 * int(middle["index"]) + (0 if is_resnet else 1)
        return f"middle_block.{place}.{_IN_RESNET.get(middle['rest'], middle['rest']) if is_resnet else middle['rest']}"
    found = _IN_BLOCK.fullmatch(layer)
    if found is None:
        return None
    block, index, rest = int(found["block"]), int(found["index"]), found["rest"]
    if found["side"] == "down":
        first = 1 + block * (shape.layers_per_block + 1)
        match found["kind"]:
            case "resnets":
                return f"input_blocks.{first + index}.0.{_IN_RESNET.get(rest, rest)}"
            case "attentions":
                return f"input_blocks.{first + index}.1.{rest}"
            case _:
                return f"input_blocks.{first + shape.layers_per_block}.0.{'op' if rest == 'conv' else rest}"
    first = block * (shape.layers_per_block + 1)
    match found["kind"]:
        case "resnets":
            return f"output_blocks.{first + index}.0.{_IN_RESNET.get(rest, rest)}"
        case "attentions":
            return f"output_blocks.{first + index}.1.{rest}"
        case _:
            place = 2 if block in shape.up_blocks_with_attention else 1
            return f"output_blocks.{first + shape.layers_per_block}.{place}.{rest}"
