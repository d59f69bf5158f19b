"""Downloads a model from the Hugging Face hub: safetensors only, one commit, its license kept beside it, verified afterwards.

    python -m stable_diffusion.models.download fp32 v1.4 fp32/models

An interrupted download resumes where it stopped. The hub's own client honours HF_ENDPOINT and HF_TOKEN.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm

from stable_diffusion.core.errors import ModelFolderError
from stable_diffusion.core.settings import MODEL_VARIABLE
from stable_diffusion.core.types import Precision
from stable_diffusion.models.folder import check_model, check_pipeline, models_in
from stable_diffusion.models.hub_files import INDEX, check_is_folder, files_of_model, license_files
from stable_diffusion.models.hub_model import PRESETS, HubModel, NotDownloadedError, parse_model

SOURCE = "source.json"  # beside the model: where it is from

_HUB = "https://huggingface.co"
_SHOWN_DIGITS = 12  # of a commit
_GB = 10**9


@dataclass(frozen=True)
class Repository:
    """A repository of the hub at one commit."""

    name: str  # owner/name
    commit: str
    license: str  # as the model card says it
    files: Mapping[str, RepoSibling]

    def fetch(self, name: str, file: Path) -> None:
        """Fetch one file through FILE.part, from which a later run resumes.

        snapshot_download would be less code, but since huggingface_hub 2 it discards what an interrupted process has fetched.
        """
        part = _part_of(file)
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        with part.open("r+b") as stream:
            fetched = stream.seek(0, io.SEEK_END)
            url = hf_hub_url(self.name, name, revision=self.commit)
            http_get(url, stream, resume_size=fetched, expected_size=self.files[name].size, headers=build_hf_headers())
        if not _is_the_hubs(part, self.files[name]):
            part.unlink()
            raise ModelFolderError(f"{file}: the downloaded file differs from the hub's; run the command again")
        part.replace(file)

    def is_fetched(self, name: str, file: Path) -> bool:
        return file.is_file() and _is_the_hubs(file, self.files[name])


def download(model: HubModel, precision: Precision, models: Path) -> Path:
    """Fetch what is missing of `model` into the folder `models`, compare every file with the hub's, and check the whole model.

    Returns the model's folder or file. Raises NotDownloadedError before anything large is fetched, ModelFolderError if the downloaded
    model cannot be served, and errors of the hub's client.
    """
    target = models / model.name
    source = _source_file(model, target)
    repository = _find(model, target, _read_source(source))
    if model.file is not None:
        if model.file not in repository.files:
            others = [name for name in repository.files if name.endswith(".safetensors")]
            raise NotDownloadedError(f"{model.repository} has no {model.file}; its safetensors: {', '.join(others) or 'none'}")
        files, described = {model.file: target}, "One file"
    else:
        names, is_half = _files_of_folder(repository, precision)
        files, described = {name: target / name for name in names}, _described(precision, is_half)
    if not source.exists():
        _write_source(source, repository, model)  # first, because a later run takes a folder without it for the operator's own
    _show_and_keep_license(repository, model, target)
    missing = {name: file for name, file in files.items() if not repository.is_fetched(name, file)}
    size, left = _bytes_of(repository, files), _bytes_of(repository, missing) - _bytes_begun(missing)
    print(f"{described}: {size / _GB:.2f} GB, of which {left / _GB:.2f} GB are to be downloaded.", flush=True)
    for name, file in tqdm(missing.items(), desc="Files", unit="file"):
        repository.fetch(name, file)
    check_model(target)
    return target


def _find(model: HubModel, target: Path, source: Mapping[str, Any] | None) -> Repository:
    """The repository at the commit to fetch: the one that was pinned when this download began, else the one that is asked for."""
    if source is None and _has_content(target) and model.repository != PRESETS["v1.4"][0]:  # which had no source.json in the past
        raise NotDownloadedError(f"{target} exists, and 'make model' did not fetch it: move it away first")
    begun = None if source is None else source.get("revision")
    if source is not None and (source.get("repository"), source.get("file")) != (model.repository, model.file):
        raise NotDownloadedError(f"{target} is from {source.get('repository')}: move it away first")
    info = HfApi().model_info(model.repository, revision=model.revision or begun or "main", files_metadata=True)
    commit = str(info.sha)
    if begun not in (None, commit):
        raise NotDownloadedError(f"{target} is of commit {begun}, and the one asked for is {commit}: move the old one away first")
    print(f"{model.repository} at {commit[:_SHOWN_DIGITS]} -> {target}", flush=True)
    return Repository(model.repository, commit, _license_of(info), {sibling.rfilename: sibling for sibling in info.siblings or []})


def _has_content(target: Path) -> bool:
    return any(target.iterdir()) if target.is_dir() else target.exists()


def _files_of_folder(repository: Repository, precision: Precision) -> tuple[list[str], bool]:
    """The files to fetch, and whether they are of half precision. Fetches nothing but model_index.json."""
    names = list(repository.files)
    check_is_folder(repository.name, names)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / INDEX
        repository.fetch(INDEX, file)
        content = file.read_bytes()
    try:
        index = json.loads(content)
        check_pipeline(index, f"{repository.name}/{INDEX}")
    except (ValueError, AttributeError):
        raise NotDownloadedError(f"{repository.name}/{INDEX}: not a JSON object") from None
    except ModelFolderError as error:
        raise NotDownloadedError(str(error)) from None
    return files_of_model(repository.name, names, index, precision)


def _described(precision: Precision, is_half: bool) -> str:
    if precision == "fp16" and not is_half:
        return "Full-precision files, because the repository has no .fp16. ones (they serve with PRECISION=fp16 too)"
    if precision == "fp32" and is_half:
        return "Half-precision files, because the repository has only .fp16. ones (they serve with PRECISION=fp32 too)"
    return "Half-precision files (.fp16.)" if is_half else "Full-precision files"


def _license_of(info: ModelInfo) -> str:
    """The license as the model card says it."""
    card = info.card_data
    said = [getattr(card, field, None) for field in ("license", "license_name", "license_link")]
    return ", ".join(str(text) for text in said if text) or "not stated"


def _show_and_keep_license(repository: Repository, model: HubModel, target: Path) -> None:
    """Print the license and keep its text in the model's folder, or beside the file under the file's name."""
    print(f"License: {repository.license}; see {_HUB}/{repository.name}", flush=True)
    for name in license_files(repository.files):
        file = target / name if model.file is None else target.with_name(f"{target.stem}.{name}")
        if not repository.is_fetched(name, file):
            repository.fetch(name, file)
        print(f"License text: {file}", flush=True)


def _bytes_of(repository: Repository, names: Iterable[str]) -> int:
    return sum(repository.files[name].size or 0 for name in names)


def _bytes_begun(missing: Mapping[str, Path]) -> int:
    parts = (_part_of(file) for file in missing.values())
    return sum(part.stat().st_size for part in parts if part.is_file())


def _source_file(model: HubModel, target: Path) -> Path:
    return target / SOURCE if model.file is None else target.with_name(f"{target.stem}.{SOURCE}")


def _read_source(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        source = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        source = None
    if not isinstance(source, dict):
        raise NotDownloadedError(f"{file}: not a JSON object, remove it")
    return source


def _write_source(file: Path, repository: Repository, model: HubModel) -> None:
    source = {
        "repository": repository.name,
        "revision": repository.commit,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "license": repository.license,
    }
    if model.file is not None:
        source["file"] = model.file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")


def _part_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.part")


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


def _say_ready(target: Path, models: Path) -> None:
    print(f"Ready: {target}")
    found = models_in(models)
    if len(found) > 1:
        print(f"{models} holds {len(found)} models. To serve this one, set {MODEL_VARIABLE}={target.resolve()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("precision", choices=("fp32", "fp16"))
    parser.add_argument("model", help=f"{', '.join(PRESETS)}, owner/name[@revision] or owner/name/file.safetensors[@revision]")
    parser.add_argument("models", type=Path, help="the folder to keep it in")
    arguments = parser.parse_args()
    try:
        model = parse_model(arguments.model, arguments.precision)
        target = download(model, arguments.precision, arguments.models)
    except NotDownloadedError as error:
        sys.exit(f"Nothing was downloaded: {error}")
    except GatedRepoError:
        sys.exit(
            f"The hub asks for an account: accept the license at {_HUB}/{model.repository}, make a token at {_HUB}/settings/tokens "
            "and set HF_TOKEN to it."
        )
    except RepositoryNotFoundError:
        sys.exit(f"The hub has no model {model.repository}, or it is private: then set HF_TOKEN.")
    except RevisionNotFoundError:
        sys.exit(f"{model.repository} has no revision {model.revision}.")
    except ModelFolderError as error:
        sys.exit(f"The download is not usable: {error}")
    except Exception as error:  # includes errors of the hub client's HTTP library, which differs between versions
        sys.exit(f"The download stopped: {type(error).__name__}: {error}\nRun the command again; it resumes where it stopped.")
    _say_ready(target, arguments.models)


if __name__ == "__main__":
    main()
