"""Downloads Stable Diffusion v1.4 from the Hugging Face hub: safetensors only, a pinned revision, checked after.

    python -m stable_diffusion.download fp32 fp32/models/v1_4

An interrupted download goes on where it stopped. HF_ENDPOINT and HF_TOKEN are honoured by the hub's own client.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from tqdm import tqdm

from stable_diffusion.errors import ModelFolderError
from stable_diffusion.weights import check_model

REPOSITORY = "CompVis/stable-diffusion-v1-4"
REVISION = "133a221b8aa7292a167afc5127cb63fb5005638b"
LICENSE = "CreativeML OpenRAIL-M, https://huggingface.co/spaces/CompVis/stable-diffusion-license"

_WEIGHTS = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model", "safety_checker/model")
_DESCRIPTIONS = ("model_index.json", "*/config.json", "*/*_config.json", "tokenizer/*.json", "tokenizer/*.txt")


def patterns(precision: str) -> list[str]:
    """The files of one precision; the hub keeps half precision beside full precision, as *.fp16.safetensors."""
    suffix = ".fp16.safetensors" if precision == "fp16" else ".safetensors"
    return [*_DESCRIPTIONS, *(stem + suffix for stem in _WEIGHTS)]


def download(precision: str, folder: Path) -> None:
    """Fetch what is missing in `folder`, then check every file's size and, where the hub states it, its SHA-256."""
    snapshot_download(REPOSITORY, revision=REVISION, allow_patterns=patterns(precision), local_dir=folder)
    verify(folder)
    check_model(folder)


def verify(folder: Path) -> None:
    """Compare the files in `folder` with what the hub says of them. Raises ModelFolderError; a wrong file is removed."""
    siblings = HfApi().model_info(REPOSITORY, revision=REVISION, files_metadata=True).siblings or []
    here = [(folder / sibling.rfilename, sibling) for sibling in siblings if (folder / sibling.rfilename).is_file()]
    for file, sibling in tqdm(here, desc="Checking", unit="file"):
        is_whole = sibling.size is None or file.stat().st_size == sibling.size
        is_same = sibling.lfs is None or _sha256(file) == sibling.lfs.sha256
        if not (is_whole and is_same):
            file.unlink()
            raise ModelFolderError(f"{file}: not what the hub has, removed; run the command again")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("precision", choices=("fp32", "fp16"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(f"Stable Diffusion v1.4 ({REPOSITORY} at {REVISION[:8]}). License: {LICENSE}")
    try:
        download(arguments.precision, arguments.folder)
    except GatedRepoError:
        sys.exit(f"The hub asks for an account: accept the license at https://huggingface.co/{REPOSITORY} and set HF_TOKEN.")
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        sys.exit(f"The download stopped: {error}\nRun the command again, it goes on where it stopped.")
    except ModelFolderError as error:
        sys.exit(f"The download is not usable: {error}")
    print(f"Ready: {arguments.folder}")


if __name__ == "__main__":
    main()
