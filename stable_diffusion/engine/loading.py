"""Loads weights from disk into the parts of a pipeline. The only place that chooses the device and the dtype.

Independent of jobs, batching and HTTP.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPTextModel, CLIPTokenizer

from stable_diffusion.core.types import Precision
from stable_diffusion.engine.allocator import keep_freed_memory
from stable_diffusion.engine.previews import latent_to_rgb
from stable_diffusion.models.embeddings import read_embeddings
from stable_diffusion.models.folder import ModelFolder
from stable_diffusion.models.loras import LoraFolder, Loras

logger = logging.getLogger("stable_diffusion")


@dataclass(frozen=True)
class Parts:
    """A loaded Stable Diffusion model. All jobs share it, so it must not be changed."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: Any  # a diffusers noise scheduler, from whose configuration each job's own is made
    safety_checker: StableDiffusionSafetyChecker | None
    feature_extractor: Any | None
    device: torch.device
    dtype: torch.dtype
    latent_to_rgb: torch.Tensor  # for previews
    inversions: Mapping[str, list[int]]  # tokens by a textual inversion's name
    loras: Callable[[], Loras]  # returns the files that exist now


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor with the number of computing threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.get_num_threads()} threads"


def placement(precision: Precision) -> tuple[torch.device, torch.dtype]:
    """The device for a model, and the dtype of its computation."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device, torch.float16 if precision == "fp16" and device.type == "cuda" else torch.float32


def load(model: ModelFolder, precision: Precision) -> Parts:
    """Load `model` onto the GPU if there is one. A CPU computes half precision in float32, because its kernels are slow or missing."""
    device, dtype = placement(precision)
    if device.type == "cpu":
        keep_freed_memory()
    if precision == "fp16" and dtype == torch.float32:
        logger.warning("No GPU: the half-precision weights are computed in float32.")
    pipeline = StableDiffusionPipeline.from_pretrained(
        model.path, dtype=dtype, variant=model.variant, use_safetensors=True, local_files_only=True
    ).to(device)
    logger.info("Loaded %s on %s as %s.", model.name, device, dtype)
    return Parts(
        tokenizer=pipeline.tokenizer,
        text_encoder=pipeline.text_encoder.eval(),
        unet=pipeline.unet.eval(),
        vae=pipeline.vae.eval(),
        scheduler=pipeline.scheduler,
        safety_checker=pipeline.safety_checker,
        feature_extractor=pipeline.feature_extractor,
        device=device,
        dtype=dtype,
        latent_to_rgb=latent_to_rgb(model.path),
        inversions=_add_inversions(pipeline.text_encoder, model),
        loras=LoraFolder(model.loras, model).look,
    )


def _add_inversions(text_encoder: CLIPTextModel, model: ModelFolder) -> dict[str, list[int]]:
    """Append the vectors of the model's textual inversions to the text encoder's tokens. Returns the new tokens by name."""
    found = read_embeddings(model)
    for name, reason in found.refused.items():
        logger.warning("The textual inversion %s is ignored: %s.", name, reason)
    embedding = text_encoder.get_input_embeddings()
    weight = embedding.weight.data
    tokens: dict[str, list[int]] = {}
    rows = [weight]
    count = len(weight)
    for name, file in found.files.items():
        vectors = safetensors.torch.load_file(file.path)[file.tensor].reshape(file.vectors, file.width)
        if not torch.isfinite(vectors).all():
            logger.warning("The textual inversion %s is ignored: it contains NaN or infinity.", name)
            continue
        rows.append(vectors.to(weight))
        tokens[name] = list(range(count, count + file.vectors))
        count += file.vectors
    if tokens:
        embedding.weight.data = torch.cat(rows)
        logger.info("Textual inversions: %s.", ", ".join(tokens))
    return tokens
