"""The training scripts make a model and its adapters with one command each (two steps here, which learn nothing sensible)."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from stable_diffusion.engine.previews import latent_to_rgb
from stable_diffusion.models.embeddings import read_embeddings
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from stable_diffusion.models.loras import LoraFolder


def train(module: str, *arguments: str, home: Path) -> None:
    command = [sys.executable, "-m", f"stable_diffusion.demo.{module}", *arguments]
    threads = {name: value for name, value in os.environ.items() if name.startswith("OMP_")}
    environment = threads | {"PATH": os.environ["PATH"], "HOME": str(home), "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr


def test_one_command_trains_a_model_without_any_download(tmp_path: Path) -> None:
    train("train", "--autoencoder-steps", "2", "--denoiser-steps", "2", "--output", str(tmp_path / "model"), home=tmp_path)
    check_model(tmp_path / "model")
    assert latent_to_rgb(tmp_path / "model", is_xl=False).shape == (5, 3)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red circle", num_inference_steps=1).images[0].size == (64, 64)


def test_one_command_trains_all_adapters_in_files_that_the_server_accepts(tmp_path: Path) -> None:
    train("train_adapters", "--steps", "2", "--output", str(tmp_path), home=tmp_path)
    model = replace(check_model(DEMO_FOLDER), loras=tmp_path / "loras", embeddings=tmp_path / "embeddings")
    loras, inversions = LoraFolder(model.loras, model).look(), read_embeddings(model)
    assert (list(loras.files), dict(loras.refused)) == (["hollow", "lcm", "pink"], {})
    assert (list(inversions.files), dict(inversions.refused)) == (["sun"], {})
