"""Downloads Stable Diffusion v1.4 from the Hugging Face hub: safetensors only, a pinned revision, verified afterwards.

    python -m stable_diffusion.models.download fp32 fp32/models/v1_4

An interrupted download resumes where it stopped. The hub's own client honours HF_ENDPOINT and HF_TOKEN.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers, filter_repo_objects
from tqdm import tqdm

from stable_diffusion.core.errors import ModelFolderError
from stable_diffusion.models.folder import check_model

REPOSITORY = "CompVis/stable-diffusion-v1-4"
REVISION = "133a221b8aa7292a167afc5127cb63fb5005638b"
LICENSE = "CreativeML OpenRAIL-M, https://huggingface.co/spaces/CompVis/stable-diffusion-license"

_WEIGHTS = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model", "safety_checker/model")
_DESCRIPTIONS = ("model_index.json", "*/config.json", "*/*_config.json", "tokenizer/*.json", "tokenizer/*.txt")


def patterns(precision: str) -> list[str]:
    """File patterns of one precision. The hub keeps half precision beside full precision, as *.fp16.safetensors."""
    suffix = ".fp16.safetensors" if precision == "fp16" else ".safetensors"
    return [*_DESCRIPTIONS, *(stem + suffix for stem in _WEIGHTS)]


def download(precision: str, folder: Path) -> None:
    """Fetch missing files into `folder`, compare every file with the hub's size and hash, and check the whole model."""
    siblings = HfApi().model_info(REPOSITORY, revision=REVISION, files_metadata=True).siblings or []
    wanted = list(filter_repo_objects(siblings, allow_patterns=patterns(precision), key=lambda sibling: sibling.rfilename))
    for sibling in tqdm(wanted, desc="Files", unit="file"):
        file = folder / sibling.rfilename
        if not (file.is_file() and _is_the_hubs(file, sibling)):
            _fetch(sibling, file)
    check_model(folder)


def _fetch(sibling: RepoSibling, file: Path) -> None:
    """Fetch one file through FILE.part, from which a later run resumes.

    snapshot_download would be less code, but since huggingface_hub 2 it discards what an interrupted process has fetched.
    """
    part = file.with_name(f"{file.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    with part.open("r+b") as stream:
        fetched = stream.seek(0, io.SEEK_END)
        url = hf_hub_url(REPOSITORY, sibling.rfilename, revision=REVISION)
        http_get(url, stream, resume_size=fetched, expected_size=sibling.size, headers=build_hf_headers())
    if not _is_the_hubs(part, sibling):
        part.unlink()
        raise ModelFolderError(f"{file}: the downloaded file differs from the hub's; run the command again")
    part.replace(file)


def _is_the_hubs(file: Path, sibling: RepoSibling) -> bool:
    """Whether the size and, for weights, the SHA-256 match those that the hub states."""
    if sibling.size is not None and file.stat().st_size != sibling.size:
        return False
    if sibling.lfs is None:
        return True
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest() == str(sibling.lfs.sha256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("precision", choices=("fp32", "fp16"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(f"Stable Diffusion v1.4 ({REPOSITORY} at {REVISION[:8]}). License: {LICENSE}")
    try:
        download(arguments.precision, arguments.folder)
    except GatedRepoError:
        sys.exit(f"The hub requires an account: accept the license at https://huggingface.co/{REPOSITORY} and set HF_TOKEN.")
    except ModelFolderError as error:
        sys.exit(f"The download is not usable: {error}")
    except Exception as error:  # includes errors of the hub client's HTTP library, which differs between versions
        sys.exit(f"The download stopped: {type(error).__name__}: {error}\nRun the command again; it resumes where it stopped.")
    print(f"Ready: {arguments.folder}")


if __name__ == "__main__":
    main()
