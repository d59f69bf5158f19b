"""Which files of a hub repository a model needs: safetensors of one precision, configurations, tokenizers and the license.

Knows only the files' names and the content of model_index.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stable_diffusion.core.types import Precision
from stable_diffusion.models.hub_model import NotDownloadedError

INDEX = "model_index.json"
HALF_PRECISION = ".fp16"  # in the name of a half-precision file that lies beside the full-precision one

_WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "safety_checker": "model",
}
_ALWAYS = ("unet", "vae", "text_encoder")
_SAFETENSORS = ".safetensors"
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_SHOWN_FILES = 5
_CONFIGURATION = re.compile(r"(scheduler|feature_extractor|unet|vae|text_encoder(_2)?|safety_checker)/(config|\w+_config)\.json")
_TOKENIZER_FILE = re.compile(r"tokenizer(_2)?/[^/]+\.(json|txt)")
_LICENSE = re.compile(r"(licen[cs]e|copying)([._-][^/]*)?", re.IGNORECASE)


def license_files(names: Iterable[str]) -> list[str]:
    """The repository's license texts."""
    return [name for name in names if _LICENSE.fullmatch(name)]


def check_is_folder(repository: str, names: Sequence[str]) -> None:
    """Check that the repository is in diffusers' layout and has safetensors. Raises NotDownloadedError, which says what it has instead."""
    files = [name for name in names if name.endswith(_SAFETENSORS)]
    if not files:
        pickles = [name for name in names if name.endswith(_PICKLES)]
        instead = f", only {_shown(pickles)}: pickles can run code when they are loaded" if pickles else ""
        raise NotDownloadedError(f"{repository} has no {_SAFETENSORS} files{instead}")
    if INDEX not in names:
        raise NotDownloadedError(
            f"{repository} is not a model in diffusers' layout: it has no {INDEX}. "
            f"One file of it can be downloaded by name: MODEL={repository}/{files[0]} (it has {_shown(files)})"
        )


def files_of_model(repository: str, names: Sequence[str], index: Mapping[str, Any], precision: Precision) -> tuple[list[str], bool]:
    """The files to fetch for a model with the model_index.json `index`, and whether its weights are the half-precision ones.

    Half-precision files are preferred for fp16, full-precision files for fp32; where a repository has only one kind, that is taken.
    Raises NotDownloadedError, which names the component without safetensors.
    """
    components = [name for name in _WEIGHTS if name in _ALWAYS or _is_used(name, index)]
    for suffix in (HALF_PRECISION, "") if precision == "fp16" else ("", HALF_PRECISION):
        weights = {component: _weights(component, suffix, names) for component in components}
        if all(weights.values()):
            chosen = {file for files in weights.values() for file in files}
            return [name for name in names if name == INDEX or _is_description(name, index) or name in chosen], suffix == HALF_PRECISION
    lacking = [component for component in components if not (_weights(component, "", names) or _weights(component, HALF_PRECISION, names))]
    if not lacking:
        raise NotDownloadedError(f"{repository}: some components have only half-precision files, others only full-precision ones")
    pickles = [name for name in names if name.startswith(f"{lacking[0]}/") and name.endswith(_PICKLES)]
    instead = f", only {_shown(pickles)}: pickles can run code when they are loaded" if pickles else ""
    raise NotDownloadedError(f"{repository}: {lacking[0]} has no {_SAFETENSORS} file{instead}")


def _weights(component: str, suffix: str, names: Sequence[str]) -> list[str]:
    """One component's weight files: one, or shards and their index. Empty if there are none."""
    stem = _WEIGHTS[component]
    single, index = f"{component}/{stem}{suffix}{_SAFETENSORS}", f"{component}/{stem}{_SAFETENSORS}.index{suffix}.json"
    if index not in names:
        return [single] if single in names else []
    end = re.escape(suffix)  # libraries write it before or after the shard's number
    shard = re.compile(rf"{component}/{stem}({end}-\d+-of-\d+|-\d+-of-\d+{end}){_SAFETENSORS}")
    return [index, *(name for name in names if shard.fullmatch(name))]


def _is_description(name: str, index: Mapping[str, Any]) -> bool:
    return _is_used(name.partition("/")[0], index) and (_CONFIGURATION.fullmatch(name) or _TOKENIZER_FILE.fullmatch(name)) is not None


def _is_used(component: str, index: Mapping[str, Any]) -> bool:
    stated = index.get(component)
    return isinstance(stated, list) and stated[:1] not in ([], [None])


def _shown(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN_FILES
    return ", ".join(names[:_SHOWN_FILES]) + (f" and {more} more" if more > 0 else "")
