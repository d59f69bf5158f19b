"""An autoencoder (VAE) in a file of its own, which replaces a model's: whether it fits, and its tensors by diffusers' names.

Reads headers and samples, without torch. `engine/loading.py` loads the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stable_diffusion.core.errors import ModelFolderError
from stable_diffusion.models.ldm_names import UNET_PREFIX, Tensor, tensors_of_vae
from stable_diffusion.models.safetensors import read_tensor_list
from stable_diffusion.models.single_file import read_tensors, require_tensors, samples_of_tensors


def check_vae(file: Path, folder: Path) -> None:
    """Check that `file` is a whole autoencoder like the one that `folder`, a model's, has a configuration of. Raises ModelFolderError."""
    tensors = read_tensors(file)
    if any(name.startswith(UNET_PREFIX) for name in tensors):
        raise ModelFolderError(f"{file}: it is a whole model; expected an autoencoder (VAE) alone")
    if not any(name.startswith(("encoder.", "first_stage_model.encoder.")) for name in tensors):
        raise ModelFolderError(f"{file}: it is not an autoencoder (VAE): there is no encoder.conv_in.weight")
    require_tensors(file, "an autoencoder like the model's", "vae", tensors_of_vae(_config(folder), tensors), tensors)


def vae_tensors(file: Path, folder: Path) -> list[Tensor]:
    """The tensors of a checked file."""
    return tensors_of_vae(_config(folder), read_tensor_list(file)[0])


def samples_of_vae(file: Path, folder: Path) -> Iterator[tuple[str, bytes]]:
    """As `samples_of` for the same autoencoder in a folder of diffusers."""
    return samples_of_tensors(file, vae_tensors(file, folder))


def _config(folder: Path) -> Mapping[str, Any]:
    config: dict[str, Any] = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    return config
