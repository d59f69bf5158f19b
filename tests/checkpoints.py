"""Checkpoints in one file as trainers publish them, made from models that diffusers builds.

Written from the layouts that were published (CompVis' latent-diffusion, OpenCLIP, Stability's generative-models), module by module; shares
nothing with the code that reads them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from stable_diffusion.models.folder import DEMO_FOLDER
from stable_diffusion.models.single_file import Kind

Tensors = dict[str, torch.Tensor]
Put = Callable[[str, torch.nn.Module], None]


def unet_tensors(unet: Any) -> Tensors:
    """`openaimodel.py`: the blocks of each way are counted through, and a block is a list of ResBlock, SpatialTransformer, Upsample."""
    found: Tensors = {}

    def put(name: str, module: Any) -> None:
        found.update({f"model.diffusion_model.{name}.{part}": tensor for part, tensor in module.state_dict().items()})

    def put_residual(name: str, block: Any) -> None:
        for part, module in {
            "in_layers.0": block.norm1,
            "in_layers.2": block.conv1,
            "emb_layers.1": block.time_emb_proj,
            "out_layers.0": block.norm2,
            "out_layers.3": block.conv2,
            "skip_connection": block.conv_shortcut,
        }.items():
            if module is not None:
                put(f"{name}.{part}", module)

    put("time_embed.0", unet.time_embedding.linear_1)
    put("time_embed.2", unet.time_embedding.linear_2)
    if getattr(unet, "add_embedding", None) is not None:
        put("label_emb.0.0", unet.add_embedding.linear_1)
        put("label_emb.0.2", unet.add_embedding.linear_2)
    put("input_blocks.0.0", unet.conv_in)
    number = 0
    for block in unet.down_blocks:
        for index, residual in enumerate(block.resnets):
            number += 1
            put_residual(f"input_blocks.{number}.0", residual)
            if hasattr(block, "attentions"):
                put(f"input_blocks.{number}.1", block.attentions[index])
        if block.downsamplers:
            number += 1
            put(f"input_blocks.{number}.0.op", block.downsamplers[0].conv)
    put_residual("middle_block.0", unet.mid_block.resnets[0])
    put("middle_block.1", unet.mid_block.attentions[0])
    put_residual("middle_block.2", unet.mid_block.resnets[1])
    number = -1
    for block in unet.up_blocks:
        for index, residual in enumerate(block.resnets):
            number += 1
            modules = 1
            put_residual(f"output_blocks.{number}.0", residual)
            if hasattr(block, "attentions"):
                put(f"output_blocks.{number}.1", block.attentions[index])
                modules = 2
        if block.upsamplers:
            put(f"output_blocks.{number}.{modules}.conv", block.upsamplers[0].conv)
    put("out.0", unet.conv_norm_out)
    put("out.2", unet.conv_out)
    return found


def vae_tensors(vae: Any, prefix: str = "first_stage_model.") -> Tensors:
    """`model.py`: `up.0` is the level of the picture; attention is made of convolutions."""
    found: Tensors = {}

    def put(name: str, module: Any) -> None:
        found.update({f"{prefix}{name}.{part}": tensor for part, tensor in module.state_dict().items()})

    def put_residual(name: str, block: Any) -> None:
        for part in ("norm1", "conv1", "norm2", "conv2"):
            put(f"{name}.{part}", getattr(block, part))
        if block.conv_shortcut is not None:
            put(f"{name}.nin_shortcut", block.conv_shortcut)

    def put_middle(name: str, middle: Any) -> None:
        put_residual(f"{name}.block_1", middle.resnets[0])
        (attention,) = middle.attentions
        put(f"{name}.attn_1.norm", attention.group_norm)
        for part, linear in {"q": attention.to_q, "k": attention.to_k, "v": attention.to_v, "proj_out": attention.to_out[0]}.items():
            found[f"{prefix}{name}.attn_1.{part}.weight"] = linear.weight.detach()[:, :, None, None].contiguous()
            found[f"{prefix}{name}.attn_1.{part}.bias"] = linear.bias.detach()
        put_residual(f"{name}.block_2", middle.resnets[1])

    put("encoder.conv_in", vae.encoder.conv_in)
    for level, block in enumerate(vae.encoder.down_blocks):
        for index, residual in enumerate(block.resnets):
            put_residual(f"encoder.down.{level}.block.{index}", residual)
        if block.downsamplers:
            put(f"encoder.down.{level}.downsample.conv", block.downsamplers[0].conv)
    put_middle("encoder.mid", vae.encoder.mid_block)
    put("encoder.norm_out", vae.encoder.conv_norm_out)
    put("encoder.conv_out", vae.encoder.conv_out)
    put("decoder.conv_in", vae.decoder.conv_in)
    put_middle("decoder.mid", vae.decoder.mid_block)
    for level, block in zip(reversed(range(len(vae.decoder.up_blocks))), vae.decoder.up_blocks, strict=True):
        for index, residual in enumerate(block.resnets):
            put_residual(f"decoder.up.{level}.block.{index}", residual)
        if block.upsamplers:
            put(f"decoder.up.{level}.upsample.conv", block.upsamplers[0].conv)
    put("decoder.norm_out", vae.decoder.conv_norm_out)
    put("decoder.conv_out", vae.decoder.conv_out)
    put("quant_conv", vae.quant_conv)
    put("post_quant_conv", vae.post_quant_conv)
    return found


def clip_tensors(text_encoder: Any, prefix: str) -> Tensors:
    """OpenAI's CLIP as transformers has always saved it: under `text_model`, with the numbers of the positions."""
    model = getattr(text_encoder, "text_model", text_encoder)
    found = {f"{prefix}text_model.{name}": tensor for name, tensor in model.state_dict().items()}
    positions = torch.arange(text_encoder.config.max_position_embeddings)[None]
    return found | {f"{prefix}text_model.embeddings.position_ids": positions}


def open_clip_tensors(text_encoder: Any, prefix: str, projection: torch.Tensor, *, unused_layers: int) -> Tensors:
    """OpenCLIP's text transformer. `unused_layers`: SD 2 leaves the last one out."""
    model = getattr(text_encoder, "text_model", text_encoder)
    found: Tensors = {
        "token_embedding.weight": model.embeddings.token_embedding.weight,
        "positional_embedding": model.embeddings.position_embedding.weight,
        "ln_final.weight": model.final_layer_norm.weight,
        "ln_final.bias": model.final_layer_norm.bias,
        "text_projection": projection,
        "logit_scale": torch.tensor(4.6),
    }
    layers = [*model.encoder.layers, *[model.encoder.layers[-1]] * unused_layers]
    for number, layer in enumerate(layers):
        attention = layer.self_attn
        inward = [attention.q_proj, attention.k_proj, attention.v_proj]
        parts: dict[str, Any] = {
            "attn.out_proj": attention.out_proj,
            "ln_1": layer.layer_norm1,
            "ln_2": layer.layer_norm2,
            "mlp.c_fc": layer.mlp.fc1,
            "mlp.c_proj": layer.mlp.fc2,
        }
        block = f"transformer.resblocks.{number}"
        found[f"{block}.attn.in_proj_weight"] = torch.cat([linear.weight for linear in inward])
        found[f"{block}.attn.in_proj_bias"] = torch.cat([linear.bias for linear in inward])
        for part, module in parts.items():
            found[f"{block}.{part}.weight"], found[f"{block}.{part}.bias"] = module.weight, module.bias
    return {prefix + name: tensor.detach() for name, tensor in found.items()}


def checkpoint_tensors(pipeline: Any) -> Tensors:
    """All tensors that a trainer would publish of this pipeline, without those of training."""
    found = unet_tensors(pipeline.unet) | vae_tensors(pipeline.vae)
    if (second := getattr(pipeline, "text_encoder_2", None)) is not None:
        found |= clip_tensors(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
        projection = second.text_projection.weight.detach().T.contiguous()
        return found | open_clip_tensors(second, "conditioner.embedders.1.model.", projection, unused_layers=0)
    if pipeline.text_encoder.config.hidden_act == "quick_gelu":
        return found | clip_tensors(pipeline.text_encoder, "cond_stage_model.transformer.")
    width = pipeline.text_encoder.config.hidden_size
    projection = torch.randn(width, width) if pipeline.text_encoder.device.type != "meta" else torch.empty(width, width, device="meta")
    return found | open_clip_tensors(pipeline.text_encoder, "cond_stage_model.model.", projection, unused_layers=1)


def training_tensors(tensors: Tensors) -> Tensors:
    """What a checkpoint that can be trained on has besides: averaged weights, the tables of the noise, the loss of the autoencoder."""
    averaged = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1
        for name, tensor in tensors.items()
        if name.startswith("model.diffusion_model.")
    }
    tables = ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "logvar")
    others = {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(1000),
        "first_stage_model.loss.logvar": torch.ones(1),
    }
    return averaged | {name: torch.linspace(0, 1, 1000) for name in tables} | others


def write_checkpoint(file: Path, tensors: Tensors, dtype: torch.dtype | None = None) -> Path:
    """`dtype`: of the floating-point tensors in the file."""
    converted = {
        name: (tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor).detach().clone().contiguous()
        for name, tensor in tensors.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(converted, file, metadata={"format": "pt"})
    return file


@dataclass(frozen=True)
class Tiny:
    """A small model of random weights: as diffusers' folder, and the folder of its kind, which has configurations only."""

    pipeline: Any
    folder: Path
    kind: Kind


_UNET: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 32, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 40, "attention_head_dim": [2, 2, 4, 4], "use_linear_projection": True, "upcast_attention": True},
}
_FOUR_LEVELS: dict[str, Any] = {
    "block_out_channels": (32, 32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
_XL: dict[str, Any] = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4, 4),
    "cross_attention_dim": 72,
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2, 3),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 40,
}


def make_tiny(family: str, folder: Path, *, channels: int = 4) -> Tiny:
    """`family`: "sd1", "sd2" or "sdxl", built like the real ones, with the demo model's tokenizer."""
    torch.manual_seed(len(family) + channels)
    levels = _XL if family == "sdxl" else {**_FOUR_LEVELS, **_UNET[family]}
    unet = UNet2DConditionModel(sample_size=8, in_channels=channels, norm_num_groups=8, **levels)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=2,
        norm_num_groups=4,
    )
    tokenizer = CLIPTokenizer.from_pretrained(DEMO_FOLDER / "tokenizer")
    # SD 2 has 23 of OpenCLIP's 24 layers.
    texts = {"sd1": (32, 2, "quick_gelu"), "sd2": (40, 23, "gelu"), "sdxl": (32, 2, "quick_gelu")}[family]
    components: dict[str, Any] = {
        "unet": unet,
        "vae": vae,
        "text_encoder": CLIPTextModel(_text_config(*texts)),
        "tokenizer": tokenizer,
    }
    if family == "sdxl":
        components |= {"text_encoder_2": CLIPTextModelWithProjection(_text_config(40, 3, "gelu")), "tokenizer_2": tokenizer}
        pipeline: Any = StableDiffusionXLPipeline(**components, scheduler=EulerDiscreteScheduler(**_NOISE))
    else:
        predicts_v = DDIMScheduler(**_NOISE, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False)
        scheduler = predicts_v if family == "sd2" else PNDMScheduler(**_NOISE, skip_prk_steps=True)
        pipeline = StableDiffusionPipeline(
            **components, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    for module in (unet, vae):
        module.eval()
    pipeline.save_pretrained(folder / "whole")
    shutil.copytree(folder / "whole", folder / "kind", ignore=shutil.ignore_patterns("*.safetensors"))
    return Tiny(pipeline, folder / "whole", Kind(f"a tiny {family}", folder / "kind"))


_NOISE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def _text_config(width: int, layers: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        hidden_act=activation,
        projection_dim=width,
        vocab_size=1252,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def modules_of(pipeline: Any) -> Iterator[tuple[str, Any]]:
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(pipeline, component, None) is not None:
            yield component, getattr(pipeline, component)
