"""Tiny models with random weights, written as diffusers folders: for kinds of which no trained one is small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from stable_diffusion.models.folder import DEMO_FOLDER

_POOLED = 40


def _text_config(width: int, layers: int, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        projection_dim=_POOLED,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def write_tiny_xl(folder: Path, *, in_channels: int = 4, sample_size: int = 8, **options: Any) -> Path:
    """Stable Diffusion XL in small: two text encoders of different width and padding, blocks of several transformer layers, its VAE scale.

    `options` are further ones of the pipeline.
    """
    torch.manual_seed(7)
    tokenizer = CLIPTokenizer.from_pretrained(DEMO_FOLDER / "tokenizer")
    second = CLIPTokenizer.from_pretrained(DEMO_FOLDER / "tokenizer", pad_token="!")
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=in_channels,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + _POOLED,
        cross_attention_dim=32 + 48,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        scaling_factor=0.13025,
    )
    kind = StableDiffusionXLPipeline if in_channels == 4 else StableDiffusionXLInpaintPipeline
    pipeline = kind(
        vae=vae,
        text_encoder=CLIPTextModel(_text_config(32, 3, tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(48, 4, tokenizer)),
        tokenizer=tokenizer,
        tokenizer_2=second,
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1),
        **options,
    )
    pipeline.save_pretrained(folder)
    return folder
