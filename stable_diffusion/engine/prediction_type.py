"""Finds out from a loaded model what its UNet predicts: the noise, or v (Salimans and Ho 2022), which its file may not say."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from stable_diffusion.models.single_file import PredictionType

_SIDE = 32  # latent pixels
_LIMIT = 0.5


@torch.inference_mode()
def prediction_type_of(unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> PredictionType:
    """Let the UNet look at pure noise as at the last timestep.

    A UNet that predicts noise finds what it has got: the correlation with the input is nearly 1. v is there the negated image, which has
    nothing to do with the noise: the correlation is nearly 0. Always of the same noise, so that each start finds the same.
    """
    tokens: Any = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    texts = text_encoder(tokens.to(unet.device))[0]
    noise = torch.randn((1, unet.config.in_channels, _SIDE, _SIDE), generator=torch.Generator().manual_seed(0))
    predicted = unet(noise.to(unet.device, unet.dtype), 999, encoder_hidden_states=texts).sample.float().cpu()
    similarity = torch.nn.functional.cosine_similarity(noise.flatten(), predicted.flatten(), dim=0)
    return "epsilon" if similarity > _LIMIT else "v_prediction"
