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

import safetensors
import safetensors.torch
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from stable_diffusion.core.types import Precision
from stable_diffusion.engine.allocator import keep_freed_memory
from stable_diffusion.engine.prediction_type import prediction_type_of
from stable_diffusion.engine.previews import latent_to_rgb
from stable_diffusion.engine.prompts import TextEncoder
from stable_diffusion.models.clip_vocabulary import clip_vocabulary
from stable_diffusion.models.defaults import FILE_NAME
from stable_diffusion.models.embeddings import read_embeddings
from stable_diffusion.models.folder import ModelFolder
from stable_diffusion.models.loras import LoraFolder, Loras
from stable_diffusion.models.single_file import renamed_text_encoder
from stable_diffusion.models.vae_file import vae_tensors

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
    pipeline = pipeline_of(model, dtype).to(device)
    _adapt_scheduler(pipeline, model)
    if model.is_xl and pipeline.vae.config.force_upcast and pipeline.vae.dtype != torch.float32:
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


def pipeline_of(model: ModelFolder, dtype: torch.dtype) -> Any:
    """The model as diffusers' pipeline. Nothing is fetched."""
    kind = StableDiffusionXLPipeline if model.is_xl else StableDiffusionPipeline
    parts: dict[str, Any] = {} if model.vae is None else {"vae": _load_vae(model.vae, model.path, dtype)}
    if model.file is None:
        return kind.from_pretrained(model.path, dtype=dtype, variant=model.variant, use_safetensors=True, local_files_only=True, **parts)
    if not (model.path / "tokenizer").is_dir():
        parts |= shipped_tokenizers(model.path, is_xl=model.is_xl)
    if (sources := renamed_text_encoder(model.file, model.path)) is not None:
        parts["text_encoder"] = _load_text_encoder(model.file, model.path, sources, dtype)
    return kind.from_single_file(str(model.file), config=str(model.path), dtype=dtype, local_files_only=True, **parts)


def _load_text_encoder(file: Path, folder: Path, sources: Mapping[str, str], dtype: torch.dtype) -> CLIPTextModel:
    """`sources`: the names in the file by those in the text encoder."""
    text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder", local_files_only=True))
    with safetensors.safe_open(file, framework="pt") as opened:
        text_encoder.load_state_dict({name: opened.get_tensor(source).to(dtype) for name, source in sources.items()}, assign=True)
    return text_encoder


def _load_vae(file: Path, folder: Path, dtype: torch.dtype) -> AutoencoderKL:
    """The autoencoder of a checked file, with the configuration of the model in `folder`. diffusers' loader knows two of its spellings."""
    weights = safetensors.torch.load_file(file)
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae", local_files_only=True))
    named = {tensor.name: weights[tensor.source].reshape(tensor.shape).to(dtype) for tensor in vae_tensors(file, folder)}
    vae.load_state_dict(named, assign=True)
    logger.info("Loaded the autoencoder %s in place of the model's.", file.name)
    return vae.eval()


def shipped_tokenizers(folder: Path, *, is_xl: bool) -> dict[str, CLIPTokenizer]:
    """CLIP's tokenizer for each text encoder of the kind in `folder`.

    OpenAI's models pad with the end of the text, OpenCLIP's with "!". They differ in their activation too.
    """
    vocabulary, merges = clip_vocabulary()
    tokenizers = {}
    for number in ("", "_2") if is_xl else ("",):
        config = CLIPTextConfig.from_pretrained(folder, subfolder=f"text_encoder{number}", local_files_only=True)
        padding = "<|endoftext|>" if config.hidden_act == "quick_gelu" else "!"
        length = config.max_position_embeddings
        tokenizers[f"tokenizer{number}"] = CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=padding, model_max_length=length)
    return tokenizers


def _adapt_scheduler(pipeline: Any, model: ModelFolder) -> None:
    """Give the noise scheduler what the model's folder or kind does not say of it."""
    changes = dict(model.scheduler_changes)
    if model.is_prediction_type_unknown:
        found = prediction_type_of(pipeline.unet, pipeline.text_encoder, pipeline.tokenizer)
        size, file = f"{model.native_width}x{model.native_height}", f"{model.name}.{FILE_NAME}"
        logger.info(
            '%s: a test of the UNet shows "prediction_type": "%s". The native size is %s unless %s says more.',
            model.name,
            found,
            size,
            file,
        )
        changes["prediction_type"] = found
    if changes:
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changes)


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
