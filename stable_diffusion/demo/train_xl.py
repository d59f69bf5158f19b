"""Trains the demo XL model: Stable Diffusion XL in small, derived from the demo model by adding what XL has and training on.

    python -m stable_diffusion.demo.train_xl         # about 15 minutes on a CPU

It adds a second text encoder and the UNet's inputs for the summary of the text, the sizes and the crop. New weights start at zero where
that leaves the demo model's predictions as they are. It writes a plain diffusers folder and does not depend on the service.
"""

from __future__ import annotations

import argparse
import copy
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from stable_diffusion.demo.train import MODEL_DIR, NOISE_SCHEDULE, SEED, SIDE, SIZE_SHARES, cache_latents, cosine_rate, phrase, write_facts

XL_MODEL_DIR = Path(__file__).parent / "model_xl"
_SECOND_WIDTH = 48  # of the second text encoder
_SIZE_WIDTH = 8  # of each of the six sizes in the UNet's further input
_BATCH_SIZE = 64


@dataclass(frozen=True)
class _Parts:
    """The modules in training, with the tokenizers of the two text encoders."""

    modules: torch.nn.ModuleDict  # text_encoder, text_encoder_2, unet
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]


def _second_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_SECOND_WIDTH,
            intermediate_size=2 * _SECOND_WIDTH,
            projection_dim=_SECOND_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _with_xl_inputs(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same UNet with wider texts and the further inputs, which do not change its predictions yet."""
    first_width = unet.config.cross_attention_dim
    wider = UNet2DConditionModel.from_config(
        unet.config,
        cross_attention_dim=first_width + _SECOND_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=_SIZE_WIDTH,
        projection_class_embeddings_input_dim=6 * _SIZE_WIDTH + _SECOND_WIDTH,
    )
    weights = wider.state_dict()
    for name, weight in unet.state_dict().items():
        if weights[name].shape != weight.shape:  # keys and values of texts
            weights[name].zero_()
            weights[name][:, :first_width] = weight
        else:
            weights[name].copy_(weight)
    for parameter in wider.add_embedding.linear_2.parameters():
        torch.nn.init.zeros_(parameter)
    return wider


def _encode(parts: _Parts, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (captions, 77, width) and summaries (captions, width); zeros for an empty caption, as Stable Diffusion XL has it."""
    states = []
    for tokenizer, name in zip(parts.tokenizers, ("text_encoder", "text_encoder_2"), strict=True):
        tokens = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        output = parts.modules[name](tokens, output_hidden_states=True)
        states.append(output.hidden_states[-2])
    is_told = torch.tensor([[float(bool(caption))] for caption in captions])
    return torch.cat(states, dim=-1) * is_told[:, :, None], output.text_embeds * is_told


def train(steps: int, folder: Path) -> None:
    """Train on from the demo model and write the averaged weights to `folder`, every 200 steps and at the end."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    demo = StableDiffusionPipeline.from_pretrained(MODEL_DIR, dtype=torch.float32)
    # Stable Diffusion XL pads the texts of its second encoder with another token than those of the first.
    tokenizers = demo.tokenizer, CLIPTokenizer.from_pretrained(MODEL_DIR / "tokenizer", pad_token="!")
    modules = {
        "text_encoder": demo.text_encoder.train(),
        "text_encoder_2": _second_text_encoder(tokenizers[1]),
        "unet": _with_xl_inputs(demo.unet).train(),
    }
    parts = _Parts(torch.nn.ModuleDict(modules), tokenizers)
    averaged = copy.deepcopy(parts.modules).eval().requires_grad_(False)
    scheduler = DDPMScheduler(**NOISE_SCHEDULE)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    images = {size: min(9216 if size == (SIDE, SIDE) else 1536, _BATCH_SIZE * steps) for size in SIZE_SHARES}
    cached = {size: cache_latents(demo.vae, *size, count, "cpu") for size, count in images.items()}
    optimizer = torch.optim.AdamW(parts.modules.parameters(), lr=6e-4, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_rate(step, steps, warm_up=50))
    smooth_loss = 1.0
    progress = tqdm(range(steps), desc="demo XL")
    for step in progress:
        width, height = rng.choices(list(SIZE_SHARES), list(SIZE_SHARES.values()))[0]
        count = _BATCH_SIZE * SIDE * SIDE // (width * height)
        latents, scenes = cached[(width, height)]
        picked = rng.sample(range(len(scenes)), count)
        tokens, pooled = _encode(parts, [phrase(scenes[i], rng) for i in picked])
        sizes = torch.tensor([(height, width, 0, 0, height, width)] * count, dtype=torch.float32)
        clean = latents[picked]
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (count,))
        noisy = scheduler.add_noise(clean, noise, timesteps)
        added = {"text_embeds": pooled, "time_ids": sizes}
        predicted = parts.modules["unet"](noisy, timesteps, tokens, added_cond_kwargs=added).sample
        weights = snr[timesteps].clamp(max=5) / snr[timesteps]  # min-SNR, as in train.py
        loss = ((predicted - noise).pow(2).mean(dim=(1, 2, 3)) * weights).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parts.modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.995, (1 + step) / (20 + step))
        with torch.no_grad():
            for average, current in zip(averaged.parameters(), parts.modules.parameters(), strict=True):
                average.lerp_(current, 1 - decay)
        smooth_loss += 0.02 * (loss.item() - smooth_loss)
        progress.set_postfix(loss=f"{smooth_loss:.4f}", refresh=False)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            _save(folder, demo, parts.tokenizers, averaged)


def _save(
    folder: Path, demo: StableDiffusionPipeline, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer], modules: torch.nn.ModuleDict
) -> None:
    """Write the diffusers folder with weights in half precision, from copies: the models in training stay unchanged."""
    pipeline = StableDiffusionXLPipeline(
        vae=copy.deepcopy(demo.vae).half(),
        text_encoder=copy.deepcopy(modules["text_encoder"]).half(),
        text_encoder_2=copy.deepcopy(modules["text_encoder_2"]).half(),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=copy.deepcopy(modules["unet"]).half(),
        scheduler=EulerDiscreteScheduler.from_config({**NOISE_SCHEDULE, "steps_offset": 1, "timestep_spacing": "leading"}),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    write_facts(folder, demo.vae)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--output", type=Path, default=XL_MODEL_DIR, help="the diffusers folder to write")
    arguments = parser.parse_args()
    train(arguments.steps, arguments.output)


if __name__ == "__main__":
    main()
