"""LoRA files as trainers write them, with random values, made without the code that reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

Shape = tuple[int, ...]
TEXT_WIDTH = 96


def _attention(block: str, width: int) -> dict[str, Shape]:
    layers: dict[str, Shape] = {}
    for attention, source in (("attn1", width), ("attn2", TEXT_WIDTH)):
        name = f"{block}.transformer_blocks.0.{attention}"
        layers |= {f"{name}.to_q": (width, width), f"{name}.to_out.0": (width, width)}
        layers |= {f"{name}.to_k": (width, source), f"{name}.to_v": (width, source)}
    return layers


ATTENTION = {
    **_attention("down_blocks.0.attentions.0", 64),
    **_attention("down_blocks.1.attentions.1", 96),
    **_attention("mid_block.attentions.0", 96),
    **_attention("up_blocks.1.attentions.2", 64),
}
FEED_FORWARD: dict[str, Shape] = {
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": (768, 96),
    "mid_block.attentions.0.transformer_blocks.0.ff.net.2": (96, 384),
}
CONVOLUTIONS: dict[str, Shape] = {
    "down_blocks.0.resnets.0.conv1": (64, 64, 3, 3),
    "down_blocks.0.downsamplers.0.conv": (64, 64, 3, 3),
    "down_blocks.0.attentions.0.proj_in": (64, 64, 1, 1),
    "up_blocks.0.upsamplers.0.conv": (96, 96, 3, 3),
    "mid_block.resnets.0.time_emb_proj": (96, 256),
}
TEXT_ENCODER: dict[str, Shape] = {
    f"text_model.encoder.layers.{index}.self_attn.{layer}": (96, 96) for index in range(3) for layer in ("q_proj", "v_proj", "out_proj")
}


Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def changes(layers: Mapping[str, Shape], *, rank: int = 4, seed: int = 0, size: float = 0.1) -> Factors:
    """Random factors (down, up) for each layer, large enough to change an image."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, (out, *inner) in layers.items():
        down = torch.randn(rank, *inner, generator=generator) * size
        up = torch.randn(out, rank, *[1] * (len(inner) - 1), generator=generator) * size
        made[name] = down, up
    return made


def save_as_diffusers(
    file: Path,
    unet: Factors,
    text_encoder: Factors | None = None,
    text_encoder_2: Factors | None = None,
) -> Path:
    tensors: dict[str, torch.Tensor] = {}
    for prefix, layers in (("unet", unet), ("text_encoder", text_encoder or {}), ("text_encoder_2", text_encoder_2 or {})):
        for name, (down, up) in layers.items():
            tensors[f"{prefix}.{name}.lora_A.weight"] = down
            tensors[f"{prefix}.{name}.lora_B.weight"] = up
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)
    return file


def save_as_kohya(
    file: Path,
    unet: Factors,
    text_encoder: Factors | None = None,
    text_encoder_2: Factors | None = None,
    *,
    alpha: float | None = 2.0,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    tensors: dict[str, torch.Tensor] = {}
    first = "lora_te" if text_encoder_2 is None else "lora_te1"
    for prefix, layers in (("lora_unet", unet), (first, text_encoder or {}), ("lora_te2", text_encoder_2 or {})):
        for name, (down, up) in layers.items():
            key = f"{prefix}_{name.replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            if alpha is not None:
                tensors[f"{key}.alpha"] = torch.tensor(alpha)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata=dict(metadata or {}))
    return file
