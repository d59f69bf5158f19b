"""Previews of unfinished images without the autoencoder: the UNet's current estimate of the result, mapped linearly to RGB.

One pixel per latent, so an eighth of the image's size. Pure arithmetic on tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

FILE_NAME = "latent_to_rgb.json"
# For the autoencoders of Stable Diffusion 1.x and 2.x and of Stable Diffusion XL; the numbers are from
# https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204 and from ComfyUI's latent_formats.py.
_STABLE_DIFFUSION = ((0.298, 0.207, 0.208), (0.187, 0.286, 0.173), (-0.158, 0.189, 0.264), (-0.184, -0.271, -0.473), (0.0, 0.0, 0.0))
_STABLE_DIFFUSION_XL = (
    (0.3651, 0.4232, 0.4341),
    (-0.2533, -0.0042, 0.1068),
    (0.1076, 0.1111, -0.0362),
    (-0.3165, -0.2492, -0.2188),
    (0.1084, -0.0175, -0.0011),
)


def latent_to_rgb(model: Path, *, is_xl: bool) -> torch.Tensor:
    """The model folder's map, or Stable Diffusion's: (5, 3), from four channels and a constant to red, green and blue in -1 to 1."""
    file = model / FILE_NAME
    if file.exists():
        return torch.tensor(json.loads(file.read_text(encoding="utf-8")))
    return torch.tensor(_STABLE_DIFFUSION_XL if is_xl else _STABLE_DIFFUSION)


def expected_end(scheduler: Any, latents: torch.Tensor, timestep: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """The final latents that the UNet's prediction implies (Ho et al. 2020, equation 15; for v Salimans and Ho 2022, appendix D)."""
    if scheduler.config.prediction_type == "sample":
        return predicted
    noisy: torch.Tensor = scheduler.scale_model_input(latents, timestep)
    kept: torch.Tensor = scheduler.alphas_cumprod[int(timestep.round())]
    if scheduler.config.prediction_type == "v_prediction":
        return kept.sqrt() * noisy - (1 - kept).sqrt() * predicted
    return (noisy - (1 - kept).sqrt() * predicted) / kept.sqrt()


def to_image(latents: torch.Tensor, factors: torch.Tensor) -> Image.Image:
    """Convert latents (1, 4, height, width) to an RGB image of that height and width. Waits for the device."""
    channels = latents[0].permute(1, 2, 0).to(device="cpu", dtype=torch.float32)
    pixels = (channels @ factors[:4] + factors[4] + 1) * 127.5
    return Image.fromarray(pixels.clamp(0, 255).to(torch.uint8).numpy())


def fit(latents: torch.Tensor, pixels: torch.Tensor) -> list[list[float]]:
    """The least-squares map from latents (images, 4, h, w) to images of that size (images, 3, h, w; -1 to 1)."""
    channels = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    inputs = torch.cat([channels, torch.ones(len(channels), 1)], dim=1)
    solution = torch.linalg.lstsq(inputs, pixels.permute(0, 2, 3, 1).reshape(-1, 3)).solution
    return [[round(value, 4) for value in row] for row in solution.tolist()]
