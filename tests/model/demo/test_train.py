"""The training script makes a model from nothing with one command (two steps here, which draw nothing sensible)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from stable_diffusion.engine.previews import latent_to_rgb
from stable_diffusion.models.folder import check_model


def test_one_command_trains_a_model_without_any_download(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stable_diffusion.demo.train", "--autoencoder-steps", "2", "--denoiser-steps", "2"]
    threads = {name: value for name, value in os.environ.items() if name.startswith("OMP_")}
    environment = threads | {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        [*command, "--output", str(tmp_path / "model")], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr
    check_model(tmp_path / "model")
    assert latent_to_rgb(tmp_path / "model", is_xl=False).shape == (5, 3)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red circle", num_inference_steps=1).images[0].size == (64, 64)
