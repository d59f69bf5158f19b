"""Trains the demo model from scratch: no download, only the images that `shapes.py` renders.

    python -m stable_diffusion.demo.train            # both stages, about 90 minutes on 2 CPU cores

It trains first the autoencoder on images, then the text encoder and the UNet together on cached latents (noise
prediction, some captions empty for classifier-free guidance, averaged weights). It writes a plain diffusers
folder and does not depend on the service.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from stable_diffusion.demo.shapes import Scene, all_scenes, caption, clutter, draw, is_held_out, vary
from stable_diffusion.engine import previews

MODEL_DIR = Path(__file__).parent / "model"
SIDE = 64
SEED = 20261122

# The share of the denoiser's training steps for each image size (width, height): mostly the native one.
SIZE_SHARES = {(64, 64): 0.80, (96, 96): 0.09, (64, 96): 0.03, (96, 64): 0.03, (128, 128): 0.05}
NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    # Higher than Stable Diffusion's 0.012: the mean colour of an 8x8 latent must not be visible through the strongest noise.
    "beta_end": 0.02,
}
POLITE_WORDS = ("a photo of", "a picture of", "please draw", "masterpiece", "high quality", "4k", "very nice", "art", "simple")


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """Images of one size as (N, 3, H, W), float, -1 to 1."""
    stacked = torch.from_numpy(np.stack([np.asarray(picture) for picture in images]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


def cosine_rate(step: int, steps: int, warm_up: int = 200) -> float:
    """Learning rate as a share of its peak: linear warm-up, then half a cosine down to 2 %."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def training_scenes() -> list[Scene]:
    return [scene for scene in all_scenes() if not is_held_out(scene)]


# --- autoencoder ---------------------------------------------------------------------------------


def train_autoencoder(steps: int, device: str) -> AutoencoderKL:
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    model = AutoencoderKL(
        latent_channels=4,
        sample_size=SIDE,
        layers_per_block=1,
        norm_num_groups=8,
        block_out_channels=(16, 32, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_rate(step, steps))
    scenes = training_scenes()
    progress = tqdm(range(steps), desc="autoencoder")
    for _ in progress:
        images = [
            draw(vary(rng.choice(scenes), rng), SIDE, SIDE, rng) if rng.random() < 0.65 else clutter(SIDE, SIDE, rng) for _ in range(24)
        ]
        batch = to_tensor(images).to(device)
        with torch.autocast(device, torch.bfloat16):
            posterior = model.encode(batch).latent_dist
            reconstruction = model.decode(posterior.sample()).sample.float()
        error = reconstruction - batch
        loss = error.abs().mean() + 2 * error.pow(2).mean() + 2e-6 * posterior.kl().float().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(l1=f"{error.abs().mean().item():.4f}", refresh=False)
    model.eval()
    with torch.no_grad():
        images = [draw(vary(rng.choice(scenes), rng), SIDE, SIDE, rng) for _ in range(512)]
        latents = torch.cat([model.encode(to_tensor(images[i : i + 64]).to(device)).latent_dist.mean for i in range(0, 512, 64)])
    model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return model


def fit_previews(autoencoder: AutoencoderKL) -> list[list[float]]:
    """The linear map from latents to colours that the service's previews use."""
    rng = random.Random(SEED)
    scenes = training_scenes()
    pixels = to_tensor([draw(vary(rng.choice(scenes), rng), SIDE, SIDE, rng) for _ in range(512)])
    with torch.no_grad():
        latents = torch.cat([autoencoder.encode(part).latent_dist.mean for part in torch.split(pixels, 64)])
    small = torch.nn.functional.interpolate(pixels, size=latents.shape[-2:], mode="area")
    return previews.fit(latents * autoencoder.config.scaling_factor, small)


# --- text ----------------------------------------------------------------------------------------


def gibberish(rng: random.Random) -> str:
    """A meaningless word, so that the text encoder learns to ignore unknown words."""
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 9)))


def phrase(scene: Scene, rng: random.Random) -> str:
    """The scene in words as a person may type them: mostly the caption, sometimes with extra words, sometimes nothing."""
    kind = rng.random()
    if kind < 0.10:
        return ""
    if kind < 0.14:
        return " ".join(gibberish(rng) for _ in range(rng.randint(1, 6)))
    if kind < 0.20:
        size = f"{scene.size} " if scene.size else ""
        return f"{size}{scene.colour} {scene.shape}, {scene.background} background"
    words = caption(scene)
    if kind < 0.32:
        extra = rng.choice(POLITE_WORDS) if rng.random() < 0.5 else " ".join(gibberish(rng) for _ in range(rng.randint(1, 3)))
        return f"{extra} {words}" if rng.random() < 0.5 else f"{words}, {extra}"
    return words


def train_tokenizer(folder: Path) -> CLIPTokenizer:
    """Learn a byte-pair vocabulary from the captions with CLIP's own splitting rules, and save it."""
    rng = random.Random(SEED)
    reference = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = reference.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    corpus = [phrase(scene, rng) for scene in training_scenes() for _ in range(8)]
    tokenizer.train_from_iterator(corpus, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    # Every byte must also exist as the end of a word, or an unseen word would become an unknown token.
    vocabulary = dict(learned["vocab"])
    for letter in alphabet:
        vocabulary.setdefault(f"{letter}</w>", len(vocabulary))
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in learned["merges"]]
    result = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    result.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


# --- text encoder and UNet -----------------------------------------------------------------------


def new_denoiser(tokenizer: CLIPTokenizer, device: str) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=384,
            projection_dim=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(64, 96),
        norm_num_groups=16,
        attention_head_dim=4,
        cross_attention_dim=96,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    return text_encoder.to(device), unet.to(device)


@torch.no_grad()
def cache_latents(vae: AutoencoderKL, width: int, height: int, count: int, device: str) -> tuple[torch.Tensor, list[Scene]]:
    rng = random.Random(SEED + width * 1000 + height)
    scenes = training_scenes()
    chosen = [vary(scenes[i % len(scenes)], rng) for i in range(count)]
    latents = []
    for start in tqdm(range(0, count, 64), desc=f"latents {width}x{height}"):
        images = [draw(scene, width, height, rng) for scene in chosen[start : start + 64]]
        latents.append(vae.encode(to_tensor(images).to(device)).latent_dist.mean * vae.config.scaling_factor)
    return torch.cat(latents), chosen


def train_denoiser(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    models: tuple[CLIPTextModel, UNet2DConditionModel],
    steps: int,
    device: str,
    folder: Path,
) -> None:
    """Train the text encoder and the UNet together and write the averaged weights to `folder`, every 500 steps and at the end."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    text_encoder, unet = models
    scheduler = DDPMScheduler(**NOISE_SCHEDULE)
    snr = (scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)).to(device)
    # No more images than the training uses.
    images = {size: min(18432 if size == (SIDE, SIDE) else 3072, 64 * steps) for size in SIZE_SHARES}
    cached = {size: cache_latents(vae, *size, count, device) for size, count in images.items()}
    trained = torch.nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
    averaged = copy.deepcopy(trained).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=8e-4, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_rate(step, steps))
    progress = tqdm(range(steps), desc="denoiser")
    smooth_loss = 1.0
    for step in progress:
        width, height = rng.choices(list(SIZE_SHARES), list(SIZE_SHARES.values()))[0]
        batch_size = 64 * SIDE * SIDE // (width * height)
        latents, scenes = cached[(width, height)]
        picked = rng.sample(range(len(scenes)), batch_size)
        captions = [phrase(scenes[i], rng) for i in picked]
        tokens = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids.to(device)
        clean = latents[picked]
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (batch_size,), device=device)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        predicted = unet(noisy, timesteps, text_encoder(tokens).last_hidden_state).sample
        # Min-SNR weighting (Hang et al. 2023, gamma 5): the shape is decided at high noise, so most of the loss should be there.
        weights = snr[timesteps].clamp(max=5) / snr[timesteps]
        loss = ((predicted - noise).pow(2).mean(dim=(1, 2, 3)) * weights).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.999, (1 + step) / (20 + step))
        with torch.no_grad():
            for average, current in zip(averaged.parameters(), trained.parameters(), strict=True):
                average.lerp_(current, 1 - decay)
        smooth_loss += 0.02 * (loss.item() - smooth_loss)
        progress.set_postfix(loss=f"{smooth_loss:.4f}", refresh=False)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save(folder, vae, tokenizer, averaged["text_encoder"], averaged["unet"])


def save(folder: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
    """Write the diffusers folder with weights in half precision, from copies: the models in training stay unchanged."""
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(vae).half(),
        text_encoder=copy.deepcopy(text_encoder).half(),
        tokenizer=tokenizer,
        unet=copy.deepcopy(unet).half(),
        scheduler=PNDMScheduler.from_config(
            # With clip_sample, DDIM would clip latents as if they were pixels; Stable Diffusion's own configuration turns it off too.
            {**NOISE_SCHEDULE, "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    write_facts(folder, vae)


def write_facts(folder: Path, vae: AutoencoderKL) -> None:
    """Complete a saved folder: the map for previews, and configurations without what only holds here."""
    (folder / previews.FILE_NAME).write_text(json.dumps(fit_previews(copy.deepcopy(vae).cpu().float()), indent=1) + "\n")
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # a local path, which --resume leaves here
        if "dtype" in config:
            # transformers would load the weights in half precision; diffusers loads them in float32. Make both load float32.
            config["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoencoder-steps", type=int, default=3600)
    parser.add_argument("--denoiser-steps", type=int, default=3800)
    parser.add_argument("--output", type=Path, default=MODEL_DIR, help="the diffusers folder to write")
    parser.add_argument("--resume", action="store_true", help="continue from the weights in OUTPUT; the autoencoder stays unchanged")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    folder, device = arguments.output, arguments.device
    if arguments.resume:
        pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
        vae, tokenizer = pipeline.vae, pipeline.tokenizer
        models = pipeline.text_encoder.train(), pipeline.unet.train()
    else:
        vae = train_autoencoder(arguments.autoencoder_steps, device)
        tokenizer = train_tokenizer(folder / "tokenizer")
        models = new_denoiser(tokenizer, device)
    train_denoiser(vae.eval(), tokenizer, models, arguments.denoiser_steps, device, folder)


if __name__ == "__main__":
    main()
