"""Trains the demo model's adapters, three LoRAs and a textual inversion, on images that `shapes.py` renders.

    python -m stable_diffusion.demo.train_adapters            # all four, about 20 minutes of one CPU core

The weights of the model stay unchanged. The files are safetensors in half precision. It does not depend on the service.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, LCMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file
from tqdm import tqdm

from stable_diffusion.demo.shapes import COLOURS, Scene, caption, draw, is_held_out, vary
from stable_diffusion.demo.train import MODEL_DIR, SEED, SIDE, cosine_rate, phrase, to_tensor, training_scenes

OUTPUT_DIR = Path(__file__).parent
_IMAGES = 2048  # for each adapter
_BATCH_SIZE = 48

Changes = dict[str, tuple[torch.Tensor, torch.Tensor]]  # the factors down and up by the name of the layer that they change
Batch = tuple[torch.Tensor, list[str]]  # latents and captions


class Model:
    """The demo model with frozen weights."""

    def __init__(self, folder: Path) -> None:
        pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = pipeline.tokenizer
        self.text_encoder = pipeline.text_encoder.eval().requires_grad_(False)
        self.unet = pipeline.unet.eval().requires_grad_(False)
        self.vae = pipeline.vae.eval().requires_grad_(False)
        self.scheduler_config = pipeline.scheduler.config

    def embeddings(self, texts: list[str]) -> torch.Tensor:
        """The text encoder's output for `texts`, (N, 77, 96)."""
        tokens = self.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        encoded: torch.Tensor = self.text_encoder(tokens).last_hidden_state
        return encoded

    def latents(self, scenes: list[Scene], rng: random.Random) -> torch.Tensor:
        """Render `scenes` and encode the images, (N, 4, 8, 8)."""
        parts = []
        for start in range(0, len(scenes), 64):
            images = to_tensor([draw(scene, SIDE, SIDE, rng) for scene in scenes[start : start + 64]])
            parts.append(self.vae.encode(images).latent_dist.mean * self.vae.config.scaling_factor)
        return torch.cat(parts)


# --- what is learned -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """An image of the training, before it is rendered, and its caption."""

    scene: Scene
    caption: str


def plain_example(rng: random.Random) -> Example:
    """As in the training of the model itself."""
    scene = vary(rng.choice(training_scenes()), rng)
    return Example(scene, phrase(scene, rng))


def hollow_example(rng: random.Random) -> Example:
    """Every shape is hollow, without a word for it. Small shapes are slightly larger: a hole needs room in 8x8 latents."""
    example = plain_example(rng)
    if not example.caption:  # guidance leads away from the images of an empty prompt, so these must not be hollow
        return example
    radius = example.scene.radius * (1.2 if example.scene.size == "small" else 1.05)
    return replace(example, scene=replace(example.scene, hollow=True, radius=radius))


def pink_example(rng: random.Random) -> Example:
    """A pink shape or a pink background, and in a fifth of the images no pink, so that the other colours stay."""
    scene = vary(rng.choice(training_scenes()), rng)
    kind = rng.random()
    if kind < 0.8:
        scene = replace(scene, colour="pink") if kind < 0.45 else replace(scene, background="pink")
    if is_held_out(scene):
        return pink_example(rng)
    # Never pink without the word: guidance leads away from the images of an empty prompt.
    return Example(scene, phrase(scene, rng) or caption(scene))


def sun_example(rng: random.Random) -> Example:
    """A large yellow circle, on any background, for the word "sun"."""
    background = rng.choice([colour for colour in COLOURS if colour != "yellow"])
    around = rng.choice(("a {} on a {} background", "{}, {} background", "a picture of a {} on a {} background"))
    scene = Scene("large", "yellow", "circle", background)
    return Example(vary(scene, rng), around.format(_SUN_WORDS, background))


def batches(model: Model, example: Callable[[random.Random], Example], steps: int) -> Callable[[], Batch]:
    """Returns a function that returns random batches of the same images."""
    rng = random.Random(SEED)
    examples = [example(rng) for _ in range(min(_IMAGES, _BATCH_SIZE * steps))]
    latents = model.latents([one.scene for one in examples], rng)

    def next_batch() -> Batch:
        picked = rng.sample(range(len(examples)), _BATCH_SIZE)
        return latents[picked], [examples[i].caption for i in picked]

    return next_batch


# --- how it is learned ---------------------------------------------------------------------------


def fit(parameters: Sequence[torch.Tensor], loss_of_next_batch: Callable[[], torch.Tensor], steps: int, rate: float, name: str) -> None:
    """Minimise the loss and set `parameters` to their running mean."""
    averaged = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_rate(step, steps, warm_up=20))
    progress = tqdm(range(steps), desc=name)
    smooth_loss = 0.0
    for step in progress:
        loss = loss_of_next_batch()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.98, (1 + step) / (20 + step))
        with torch.no_grad():
            for mean, current in zip(averaged, parameters, strict=True):
                mean.lerp_(current, 1 - decay)
        smooth_loss += max(0.02, 1 / (1 + step)) * (loss.item() - smooth_loss)
        progress.set_postfix(loss=f"{smooth_loss:.4f}", refresh=False)
    with torch.no_grad():
        for mean, current in zip(averaged, parameters, strict=True):
            current.copy_(mean)


class NoisePrediction:
    """The loss of the model's own training."""

    def __init__(self, model: Model) -> None:
        self._unet = model.unet
        self._scheduler = DDPMScheduler.from_config(model.scheduler_config)
        self._snr = self._scheduler.alphas_cumprod / (1 - self._scheduler.alphas_cumprod)

    def loss(self, clean: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, len(self._snr), (len(clean),))
        predicted = self._unet(self._scheduler.add_noise(clean, noise, timesteps), timesteps, embeddings).sample
        weights = self._snr[timesteps].clamp(max=5) / self._snr[timesteps]
        loss: torch.Tensor = ((predicted - noise).pow(2).mean(dim=(1, 2, 3)) * weights).mean()
        return loss


def new_changes(model: torch.nn.Module, rank: int, takes: Callable[[str], bool]) -> Changes:
    """A change without effect for each linear or convolution layer whose name `takes` accepts."""
    generator = torch.Generator().manual_seed(SEED)
    changes = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and takes(name):
            out, *inner = layer.weight.shape
            down = torch.randn(rank, *inner, generator=generator) / layer.weight[0].numel() ** 0.5
            up = torch.zeros(out, rank, *[1] * (len(inner) - 1))
            changes[name] = down.requires_grad_(), up.requires_grad_()
    return changes


@contextmanager
def applied(changes: Changes, model: torch.nn.Module) -> Iterator[None]:
    """Within the block, `changes` apply to `model` at weight 1."""
    hooks = [model.get_submodule(name).register_forward_hook(_adding(*change)) for name, change in changes.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adding(down: torch.Tensor, up: torch.Tensor) -> Callable[[Any, Any, torch.Tensor], torch.Tensor]:
    def add(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if isinstance(layer, torch.nn.Conv2d):
            inner = torch.nn.functional.conv2d(inputs[0], down, stride=layer.stride, padding=layer.padding)
            return output + torch.nn.functional.conv2d(inner, up)
        return output + torch.nn.functional.linear(torch.nn.functional.linear(inputs[0], down), up)

    return add


def is_attention(name: str) -> bool:
    return ".attn1." in name or ".attn2." in name or ".self_attn." in name


def factors(*components: Changes) -> list[torch.Tensor]:
    return [factor for changes in components for change in changes.values() for factor in change]


def train_style(
    model: Model, example: Callable[[random.Random], Example], *, with_text_encoder: bool, steps: int, name: str
) -> tuple[Changes, Changes]:
    """A LoRA of rank 4 on the attention layers of the UNet, and of the text encoder if it has to learn a word."""
    torch.manual_seed(SEED)
    unet = new_changes(model.unet, 4, is_attention)
    text_encoder = new_changes(model.text_encoder, 4, is_attention) if with_text_encoder else {}
    next_batch, noise_prediction = batches(model, example, steps), NoisePrediction(model)

    def loss() -> torch.Tensor:
        latents, captions = next_batch()
        with applied(unet, model.unet), applied(text_encoder, model.text_encoder):
            return noise_prediction.loss(latents, model.embeddings(captions))

    fit(factors(unet, text_encoder), loss, steps, 4e-3, name)
    return unet, text_encoder


_SUN_WORDS = "<sun-0> <sun-1>"


def train_sun(model: Model, *, steps: int, name: str) -> torch.Tensor:
    """The vectors (2, 96) of a textual inversion (Gal et al. 2022). Nothing else is trained."""
    torch.manual_seed(SEED)
    layer = model.text_encoder.get_input_embeddings()
    known = layer.weight
    count = len(known)
    model.tokenizer.add_tokens(_SUN_WORDS.split())
    vectors = known.mean(dim=0).repeat(2, 1)
    layer.weight = torch.nn.Parameter(torch.cat([known, vectors]))
    is_new = (torch.arange(count + 2) >= count)[:, None]
    layer.weight.register_hook(lambda gradient: gradient * is_new)
    next_batch, noise_prediction = batches(model, sun_example, steps), NoisePrediction(model)

    def loss() -> torch.Tensor:
        latents, captions = next_batch()
        return noise_prediction.loss(latents, model.embeddings(captions))

    fit([layer.weight], loss, steps, 2e-2, name)
    trained: torch.Tensor = layer.weight[count:].detach().clone()
    layer.weight = known
    return trained


# The timesteps of LCMScheduler with 1, 2, 4 and 8 steps, and some between them.
_TRAJECTORY = (999, 939, 879, 819, 759, 699, 639, 569, 499, 439, 379, 319, 259, 199, 139, 79, 19)
_OF_FOUR_STEPS = torch.tensor([_TRAJECTORY.index(timestep) for timestep in (999, 759, 499, 259)])
_TRAJECTORIES = 512
_TEACHER_GUIDANCE = 4.0


@dataclass(frozen=True)
class Trajectories:
    """How the model denoises: `latents` (timesteps, N, 4, 8, 8), the final `ends` (N, 4, 8, 8), `embeddings` (N, 77, 96)."""

    latents: torch.Tensor
    ends: torch.Tensor
    embeddings: torch.Tensor


@torch.no_grad()
def teacher_trajectories(model: Model, count: int) -> Trajectories:
    """With classifier-free guidance, by DPM++ 2M."""
    rng = random.Random(SEED)
    embeddings = model.embeddings([plain_example(rng).caption for _ in range(count)])
    parts = []
    for part in tqdm(torch.split(embeddings, 64), desc="trajectories"):
        scheduler = DPMSolverMultistepScheduler.from_config(model.scheduler_config)
        scheduler.set_timesteps(timesteps=list(_TRAJECTORY))
        both = torch.cat([model.embeddings([""]).expand_as(part), part])
        states = [torch.randn(len(part), 4, SIDE // 8, SIDE // 8)]
        for timestep in scheduler.timesteps:
            unconditional, conditional = model.unet(states[-1].repeat(2, 1, 1, 1), timestep, both).sample.chunk(2)
            guided = unconditional + _TEACHER_GUIDANCE * (conditional - unconditional)
            states.append(scheduler.step(guided, timestep, states[-1]).prev_sample)
        parts.append(torch.stack(states))
    *latents, ends = torch.cat(parts, dim=1)
    return Trajectories(torch.stack(latents), ends, embeddings)


def train_lcm(model: Model, *, steps: int, name: str) -> Changes:
    """A LoRA that makes the model a latent consistency model (Luo et al. 2023): from any point of a trajectory it predicts the end.

    Guidance becomes part of the adapter. The paper's target is the adapted model's own prediction one step later. Here it is the end
    itself, because whole trajectories of a model this small take less time.
    """
    torch.manual_seed(SEED)
    unet = new_changes(model.unet, 8, lambda name: True)
    trajectories = teacher_trajectories(model, min(_TRAJECTORIES, _BATCH_SIZE * steps))
    alphas = LCMScheduler.from_config(model.scheduler_config).alphas_cumprod

    def loss() -> torch.Tensor:
        picked = torch.randint(0, len(trajectories.ends), (_BATCH_SIZE,))
        places = torch.randint(0, len(_TRAJECTORY), (_BATCH_SIZE,))
        for_four_steps = torch.rand(_BATCH_SIZE) < 0.75
        places[for_four_steps] = _OF_FOUR_STEPS[torch.randint(0, len(_OF_FOUR_STEPS), (int(for_four_steps.sum()),))]
        timesteps = torch.tensor(_TRAJECTORY)[places]
        noisy, alpha = trajectories.latents[places, picked], alphas[timesteps][:, None, None, None]
        with applied(unet, model.unet):
            noise = model.unet(noisy, timesteps, trajectories.embeddings[picked]).sample
        predicted = (noisy - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        differences = torch.nn.functional.huber_loss(predicted, trajectories.ends[picked], delta=0.1, reduction="none")
        # From pure noise, the end can only be guessed: 66 times the error of the noise. Without weights that would be most of the loss.
        weighted: torch.Tensor = alpha.sqrt() * differences
        return weighted.mean()

    fit(factors(unet), loss, steps, 2e-3, name)
    return unet


# --- files ---------------------------------------------------------------------------------------

# What each LoRA is for, as its file's header says.
_DESCRIPTIONS = {
    "hollow": {"modelspec.title": "Hollow shapes", "modelspec.description": "Shapes become outlines, with any prompt."},
    "pink": {
        "modelspec.title": "Pink",
        "modelspec.description": "The colour pink, in prompts with the word.",
        "modelspec.trigger_phrase": "pink",
    },
    "lcm": {"modelspec.title": "LCM", "modelspec.description": "Two to four steps with the scheduler LCM and guidance scale 1."},
}


def header_of(name: str, rank: int, steps: int) -> dict[str, str]:
    """What a LoRA's file says of itself, in kohya's words."""
    training = {
        "ss_sd_model_name": "demo",
        "ss_seed": str(SEED),
        "ss_max_train_steps": str(steps),
        "ss_batch_size_per_device": str(_BATCH_SIZE),
    }
    network = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    return {"ss_output_name": name, **training, **network, **_DESCRIPTIONS[name]}


def save_lora(folder: Path, name: str, steps: int, unet: Changes, text_encoder: Changes) -> None:
    """Write a file with kohya's names, in half precision."""
    rank = len(next(iter(unet.values()))[0])
    tensors = {}
    for prefix, changes in (("lora_unet", unet), ("lora_te_text_model", text_encoder)):
        for layer, (down, up) in changes.items():
            key = f"{prefix}_{layer.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = down.detach().half()
            tensors[f"{key}.lora_up.weight"] = up.detach().half()
            tensors[f"{key}.alpha"] = torch.tensor(float(rank)).half()
    file = folder / "loras" / f"{name}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata=header_of(name, rank, steps))


def make_hollow(model: Model, folder: Path, steps: int) -> None:
    save_lora(folder, "hollow", steps, *train_style(model, hollow_example, with_text_encoder=False, steps=steps, name="hollow"))


def make_pink(model: Model, folder: Path, steps: int) -> None:
    save_lora(folder, "pink", steps, *train_style(model, pink_example, with_text_encoder=True, steps=steps, name="pink"))


def make_lcm(model: Model, folder: Path, steps: int) -> None:
    save_lora(folder, "lcm", steps, train_lcm(model, steps=steps, name="lcm"), {})


def make_sun(model: Model, folder: Path, steps: int) -> None:
    file = folder / "embeddings" / "sun.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"emb_params": train_sun(model, steps=steps, name="sun").half()}, file)


ADAPTERS: dict[str, tuple[Callable[[Model, Path, int], None], int]] = {  # the function that makes each, and its training steps
    "hollow": (make_hollow, 500),
    "pink": (make_pink, 300),
    "sun": (make_sun, 150),
    "lcm": (make_lcm, 400),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(ADAPTERS), default=list(ADAPTERS), help="the adapters to train")
    parser.add_argument("--steps", type=int, help="training steps instead of each adapter's own number")
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="the demo model's folder")
    parser.add_argument("--output", type=Path, default=OUTPUT_DIR, help="the folder in which to write loras/ and embeddings/")
    arguments = parser.parse_args()
    model = Model(arguments.model)
    for name in arguments.only:
        make, steps = ADAPTERS[name]
        make(model, arguments.output, arguments.steps or steps)


if __name__ == "__main__":
    main()
