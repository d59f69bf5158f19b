"""Loads weights from disk into the parts of a pipeline. The only place that chooses the device and the dtype.

Independent of jobs, batching and HTTP.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from stable_diffusion.core.types import Precision
from stable_diffusion.engine.allocator import keep_freed_memory
from stable_diffusion.engine.previews import latent_to_rgb
from stable_diffusion.engine.prompts import TextEncoder
from stable_diffusion.models.embeddings import read_embeddings
from stable_diffusion.models.folder import ModelFolder
from stable_diffusion.models.loras import LoraFolder, Loras

logger = logging.getLogger("stable_diffusion")


@dataclass(frozen=True)
class Parts:
    """A loaded Stable Diffusion model. All jobs share it, so it must not be changed."""

    text_encoders: tuple[TextEncoder, ...]  # one or, in Stable Diffusion XL, two
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
    zeros_for_no_negative_prompt: bool  # else the embeddings of the empty text

    @property
    def is_xl(self) -> bool:
        """Whether the UNet takes a summary of the text, sizes and the crop as further inputs."""
        return len(self.text_encoders) > 1


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
    kind = StableDiffusionXLPipeline if model.is_xl else StableDiffusionPipeline
    pipeline = kind.from_pretrained(model.path, dtype=dtype, variant=model.variant, use_safetensors=True, local_files_only=True).to(device)
    if model.is_xl and pipeline.vae.config.force_upcast:
        pipeline.vae.float()  # its activations exceed the range of float16
    encoders = [TextEncoder(pipeline.tokenizer, pipeline.text_encoder.eval())]
    if model.is_xl:
        encoders.append(TextEncoder(pipeline.tokenizer_2, pipeline.text_encoder_2.eval()))
    logger.info("Loaded %s on %s as %s.", model.name, device, dtype)
    return Parts(
        text_encoders=tuple(encoders),
        unet=pipeline.unet.eval(),
        vae=pipeline.vae.eval(),
        scheduler=pipeline.scheduler,
        safety_checker=None if model.is_xl else pipeline.safety_checker,
        feature_extractor=pipeline.feature_extractor,
        device=device,
        dtype=dtype,
        latent_to_rgb=latent_to_rgb(model.path, is_xl=model.is_xl),
        inversions=_add_inversions([encoder.model for encoder in encoders], model),
        loras=LoraFolder(model.loras, model).look,
        zeros_for_no_negative_prompt=model.is_xl and pipeline.config.force_zeros_for_empty_prompt,
    )


def _add_inversions(text_encoders: Sequence[CLIPTextModel | CLIPTextModelWithProjection], model: ModelFolder) -> dict[str, list[int]]:
    """Append the vectors of the model's textual inversions to the text encoders' tokens. Returns the new tokens by name."""
    found = read_embeddings(model)
    for name, reason in found.refused.items():
        logger.warning("The textual inversion %s is ignored: %s.", name, reason)
    embeddings = [encoder.get_input_embeddings() for encoder in text_encoders]
    rows = [[embedding.weight.data] for embedding in embeddings]
    tokens: dict[str, list[int]] = {}
    count = len(rows[0][0])
    for name, file in found.files.items():
        content = safetensors.torch.load_file(file.path)
        vectors = [content[tensor].reshape(file.vectors, -1) for tensor in file.tensors]
        if not all(torch.isfinite(one).all() for one in vectors):
            logger.warning("The textual inversion %s is ignored: it contains NaN or infinity.", name)
            continue
        for one, row in zip(vectors, rows, strict=True):
            row.append(one.to(row[0]))
        tokens[name] = list(range(count, count + file.vectors))
        count += file.vectors
    if tokens:
        for embedding, row in zip(embeddings, rows, strict=True):
            embedding.weight.data = torch.cat(row)
        logger.info("Textual inversions: %s.", ", ".join(tokens))
    return tokens
