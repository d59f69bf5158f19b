"""`make model` against a small stand-in for the Hugging Face hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import pytest

from stable_diffusion.core.errors import ModelFolderError
from stable_diffusion.models.folder import DEMO_FOLDER, check_model, choose_model
from stable_diffusion.models.hub_model import PRESETS
from tests.model.tiny_models import write_tiny_xl
from tests.tensor_files import write, write_raw
from tests.unit.models.test_single_file import DEMO_SHAPES

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"
LICENSE = "You may look at the pictures.\n"


class Hub(BaseHTTPRequestHandler):
    """Serves a folder as the hub serves a repository. With `stall_after_bytes` it stops once in the middle of a large file."""

    folder: ClassVar[Path]
    repository: ClassVar[str]
    commit: ClassVar[str]  # that `main` and `branches` have now
    branches: ClassVar[tuple[str, ...]] = ("main",)
    is_gated: ClassVar[bool] = False
    damaged: ClassVar[str | None] = None  # a file whose last byte arrives wrong
    failing: ClassVar[str | None] = None  # a file that is answered with 500
    requested: ClassVar[list[tuple[str, str, str | None]]]
    stall_after_bytes: ClassVar[int | None]
    stalled: ClassVar[threading.Event]
    released: ClassVar[threading.Event]
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    @classmethod
    def weights_requested(cls) -> list[str]:
        return [path for command, path, _ in cls.requested if command == "GET" and path.endswith(".safetensors")]

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.requested.append((self.command, path, self.headers.get("Range")))
        resolve = f"/{self.repository}/resolve/{self.commit}/"  # never by a branch, which may move meanwhile
        api, _, revision = path.partition("/revision/")
        if api.startswith("/api/models/") and api != f"/api/models/{self.repository}":
            self._refuse(401, "RepoNotFound")
        elif api.startswith("/api/models/") and revision not in (self.commit, *self.branches):
            self._refuse(404, "RevisionNotFound")
        elif api.startswith("/api/models/"):
            self._send_json(
                {
                    "id": self.repository,
                    "modelId": self.repository,
                    "sha": self.commit,
                    "gated": "auto" if self.is_gated else False,
                    "cardData": {"license": "creativeml-openrail-m"},
                    "siblings": [self._sibling(name) for name in self._names()],
                }
            )
        elif self.is_gated and self.headers.get("Authorization") != "Bearer hf_token":
            self._refuse(401, "GatedRepo")
        elif path == f"{resolve}{self.failing}":
            self._refuse(500, "InternalError")
        elif path.startswith(resolve) and (self.folder / path.removeprefix(resolve)).is_file():
            self._send_file(path.removeprefix(resolve), with_body)
        else:
            self._refuse(404, "EntryNotFound")

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _names(self) -> list[str]:
        return sorted(str(file.relative_to(self.folder)) for file in self.folder.rglob("*") if file.is_file())

    def _is_large(self, name: str) -> bool:
        return name.endswith((".safetensors", ".bin"))

    def _sha256(self, name: str) -> str:
        return hashlib.sha256((self.folder / name).read_bytes()).hexdigest()

    def _sibling(self, name: str) -> dict[str, object]:
        size = (self.folder / name).stat().st_size
        lfs = {"lfs": {"size": size, "sha256": self._sha256(name), "pointerSize": 134}} if self._is_large(name) else {}
        return {"rfilename": name, "size": size, "blobId": "0" * 40, **lfs}

    def _send_json(self, document: object) -> None:
        content = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _send_file(self, name: str, with_body: bool) -> None:
        content = (self.folder / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        start = 0
        if (span := self.headers.get("Range")) is not None:
            start = int(span.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not with_body:
            return
        if name == self.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        body = content[start:]
        limit = type(self).stall_after_bytes
        if self._is_large(name) and limit is not None and len(body) > limit:
            self.wfile.write(body[:limit])
            self.wfile.flush()
            type(self).stall_after_bytes = None
            self.stalled.set()
            self.released.wait(60)
            self.close_connection = True
            return
        self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, type[Hub]]]:
    """A repository with both precisions, with pickles beside them and with files that nobody asked for."""
    folder = Path(shutil.copytree(DEMO_FOLDER, tmp_path / "hub"))
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    shutil.copytree(folder / "text_encoder", folder / "safety_checker")
    for file in [*folder.glob("*/*.safetensors")]:
        shutil.copy(file, file.with_suffix(".fp16.safetensors"))
        file.with_suffix(".bin").write_bytes(b"a pickle")
    (folder / "vae_encoder").mkdir()
    (folder / "vae_encoder" / "config.json").write_text("{}")
    (folder / "sd-v1-4.ckpt").write_bytes(b"another pickle")

    class ThisHub(Hub):
        pass

    ThisHub.folder, ThisHub.requested, ThisHub.stall_after_bytes = folder, [], None
    ThisHub.repository, ThisHub.commit = PRESETS["v1.4"]
    ThisHub.stalled, ThisHub.released = threading.Event(), threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), ThisHub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", ThisHub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def other_hub(hub: tuple[str, type[Hub]]) -> tuple[str, type[Hub]]:
    """The repository under another name, with a license text."""
    _, handler = hub
    handler.repository, handler.commit, handler.branches = "painter/shapes", COMMIT, ("main", "refs/pr/1")
    (handler.folder / "LICENSE.md").write_text(LICENSE)
    return hub


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def make_model(
    endpoint: str, model: str, models: Path, precision: str = "fp32", changes: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    process = start_make_model(endpoint, model, models, precision, changes)
    output, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def start_make_model(
    endpoint: str, model: str, models: Path, precision: str = "fp32", changes: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """What `make model` runs, against another hub."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(models.parent),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "stable_diffusion.models.download", precision, model, str(models)]
    return subprocess.Popen(command, env=environment | (changes or {}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def refusal(endpoint: str, model: str, models: Path) -> str:
    """What is said where nothing is downloaded, and that nothing is left behind."""
    finished = make_model(endpoint, model, models)
    assert finished.returncode == 1, finished.stdout
    assert "Traceback" not in finished.stderr
    assert list(models.iterdir()) == []
    return finished.stderr


def source_of(file: Path) -> dict[str, str]:
    source: dict[str, str] = json.loads(file.read_text())
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", source.pop("date"))
    return source


@pytest.mark.parametrize(("precision", "suffix", "name"), [("fp32", ".safetensors", "v1_4"), ("fp16", ".fp16.safetensors", "v1_4_fp16")])
def test_one_precision_is_fetched_as_safetensors_only(
    hub: tuple[str, type[Hub]], models: Path, precision: str, suffix: str, name: str
) -> None:
    endpoint, _ = hub
    finished = make_model(endpoint, "v1.4", models, precision)
    assert finished.returncode == 0, finished.stderr
    folder = models / name
    weights = sorted(str(file.relative_to(folder)) for file in folder.glob("[!.]*/*") if file.suffix not in (".json", ".txt"))
    assert weights == sorted(
        f"{component}/{stem}{suffix}"
        for component, stem in (
            ("unet", "diffusion_pytorch_model"),
            ("vae", "diffusion_pytorch_model"),
            ("text_encoder", "model"),
            ("safety_checker", "model"),
        )
    )
    assert not (folder / "vae_encoder").exists()
    model = check_model(folder)
    assert model.variant == (None if precision == "fp32" else "fp16")
    assert model.has_safety_checker
    assert "License: creativeml-openrail-m" in finished.stdout
    assert re.search(r"Files: 100%", finished.stderr), "no progress bar"
    repository, revision = PRESETS["v1.4"]
    assert source_of(folder / "source.json") == {"repository": repository, "revision": revision, "license": "creativeml-openrail-m"}


def test_a_broken_download_goes_on_where_it_stopped_and_a_second_run_fetches_nothing(hub: tuple[str, type[Hub]], models: Path) -> None:
    endpoint, handler = hub
    folder = models / "v1_4"
    header = json.dumps({"weight": {"dtype": "F32", "shape": [6_000_000], "data_offsets": [0, 24_000_000]}}).encode()
    write_raw(handler.folder / "unet" / "diffusion_pytorch_model.safetensors", header, os.urandom(24_000_000))
    handler.stall_after_bytes = 15_000_000  # the client writes in pieces of 10 MB
    first = start_make_model(endpoint, "v1.4", models)
    assert handler.stalled.wait(60)
    time.sleep(1)  # what was sent reaches the disk
    first.kill()
    first.communicate()
    handler.released.set()
    with pytest.raises(ModelFolderError):
        check_model(folder)
    assert not [path for _, path, span in handler.requested if span]
    again = make_model(endpoint, "v1.4", models)
    assert again.returncode == 0, again.stderr
    size, left = re.findall(r"[\d.]+(?= GB)", again.stdout)
    assert float(size) > float(left)
    resumed = [span for command, path, span in handler.requested if command == "GET" and path.endswith(".safetensors") and span]
    assert resumed, "no file was resumed"
    check_model(folder)
    handler.requested.clear()
    assert make_model(endpoint, "v1.4", models).returncode == 0
    assert not handler.weights_requested()


def test_a_file_that_differs_from_the_hubs_is_found_and_fetched_again(hub: tuple[str, type[Hub]], models: Path) -> None:
    endpoint, _ = hub
    assert make_model(endpoint, "v1.4", models).returncode == 0
    file = models / "v1_4" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (models / "v1_4" / "source.json").unlink()  # as before there was one
    finished = make_model(endpoint, "v1.4", models)
    assert finished.returncode == 0, finished.stderr
    assert file.read_bytes() == (DEMO_FOLDER / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_a_file_that_arrives_damaged_is_not_kept(other_hub: tuple[str, type[Hub]], models: Path) -> None:
    endpoint, handler = other_hub
    handler.damaged = "unet/diffusion_pytorch_model.safetensors"
    finished = make_model(endpoint, "painter/shapes", models)
    assert finished.returncode == 1
    assert "unet/diffusion_pytorch_model.safetensors: the downloaded file differs from the hub's" in finished.stderr
    assert not list((models / "shapes" / "unet").glob("*.safetensors*"))
    with pytest.raises(ModelFolderError, match="missing"):
        choose_model(models, {}, in_bento=False)
    handler.damaged = None
    assert make_model(endpoint, "painter/shapes", models).returncode == 0
    check_model(models / "shapes")


@pytest.mark.parametrize("failing", ["LICENSE.md", "tokenizer/vocab.json", "vae/diffusion_pytorch_model.safetensors"])
def test_a_download_that_stopped_anywhere_can_be_continued(other_hub: tuple[str, type[Hub]], models: Path, failing: str) -> None:
    endpoint, handler = other_hub
    handler.failing = failing
    stopped = make_model(endpoint, "painter/shapes", models)
    assert stopped.returncode == 1
    assert "Run the command again; it resumes where it stopped." in stopped.stderr
    with pytest.raises(ModelFolderError, match="missing"):
        choose_model(models, {}, in_bento=False)
    handler.failing = None
    finished = make_model(endpoint, "painter/shapes", models)
    assert finished.returncode == 0, finished.stderr
    check_model(models / "shapes")


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(models: Path) -> None:
    finished = make_model("http://127.0.0.1:9", "v1.4", models)
    assert finished.returncode == 1
    assert "The download stopped" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_another_repository_is_kept_under_its_name_at_the_commit_that_its_branch_had(
    other_hub: tuple[str, type[Hub]], models: Path
) -> None:
    endpoint, handler = other_hub
    finished = make_model(endpoint, "painter/shapes@refs/pr/1", models)
    assert finished.returncode == 0, finished.stderr
    assert source_of(models / "shapes" / "source.json") == {
        "repository": "painter/shapes",
        "revision": COMMIT,
        "license": "creativeml-openrail-m",
    }
    assert choose_model(models, {}, in_bento=True).name == "shapes"
    # The branch moves on: what was begun stays at its commit.
    file = models / "shapes" / "vae" / "config.json"
    file.unlink()
    assert make_model(endpoint, "painter/shapes", models).returncode == 0
    assert file.is_file()
    handler.commit = LATER_COMMIT
    moved = make_model(endpoint, "painter/shapes@main", models)
    assert moved.returncode == 1
    assert f"is of commit {COMMIT}, and the one asked for is {LATER_COMMIT}: move the old one away first" in moved.stderr


def test_the_license_is_shown_and_kept_before_any_weights_are_fetched(other_hub: tuple[str, type[Hub]], models: Path) -> None:
    endpoint, handler = other_hub
    finished = make_model(endpoint, "painter/shapes", models)
    assert finished.returncode == 0, finished.stderr
    kept = models / "shapes" / "LICENSE.md"
    assert kept.read_text() == LICENSE
    assert "License: creativeml-openrail-m; see https://huggingface.co/painter/shapes\n" in finished.stdout
    assert f"License text: {kept}\n" in finished.stdout
    fetched = [path.rpartition("/")[2] for command, path, _ in handler.requested if command == "GET"]
    assert fetched.index("LICENSE.md") < min(number for number, name in enumerate(fetched) if name.endswith(".safetensors"))


@pytest.mark.parametrize(
    ("precision", "without", "said"),
    [
        ("fp16", ".fp16", "Full-precision files, because the repository has no .fp16. ones (they serve with PRECISION=fp16 too)"),
        ("fp32", "", "Half-precision files, because the repository has only .fp16. ones (they serve with PRECISION=fp32 too)"),
    ],
)
def test_the_precision_that_a_repository_has_is_taken_and_named(
    other_hub: tuple[str, type[Hub]], models: Path, precision: str, without: str, said: str
) -> None:
    endpoint, handler = other_hub
    for file in handler.folder.glob("*/*.safetensors"):
        if (".fp16" in file.name) == bool(without):
            file.unlink()
    finished = make_model(endpoint, "painter/shapes", models, precision)
    assert finished.returncode == 0, finished.stderr
    files = [file for file in (models / "shapes").rglob("*") if file.is_file() and file.name not in ("LICENSE.md", "source.json")]
    size = f"{sum(file.stat().st_size for file in files) / 1e9:.2f} GB"
    assert f"{said}: {size}, of which {size} are to be downloaded.\n" in finished.stdout
    assert check_model(models / "shapes").variant == (None if without else "fp16")


def test_stable_diffusion_xl_is_fetched_with_both_text_encoders(other_hub: tuple[str, type[Hub]], models: Path, tmp_path: Path) -> None:
    endpoint, handler = other_hub
    handler.folder = write_tiny_xl(tmp_path / "xl")
    finished = make_model(endpoint, "painter/shapes", models)
    assert finished.returncode == 0, finished.stderr
    assert check_model(models / "shapes").is_xl
    assert (models / "shapes" / "tokenizer_2" / "tokenizer_config.json").is_file()


def test_one_file_is_kept_with_its_license_and_source_beside_it(other_hub: tuple[str, type[Hub]], models: Path) -> None:
    endpoint, handler = other_hub
    (handler.folder / "files").mkdir()
    file = write(handler.folder / "files" / "shapes-v2.safetensors", DEMO_SHAPES, dtype="F16")
    finished = make_model(endpoint, "painter/shapes/files/shapes-v2.safetensors@main", models)
    assert finished.returncode == 0, finished.stderr
    kept = ["shapes-v2.LICENSE.md", "shapes-v2.safetensors", "shapes-v2.source.json"]
    assert sorted(path.name for path in models.iterdir()) == kept
    assert (models / "shapes-v2.safetensors").read_bytes() == file.read_bytes()
    assert source_of(models / "shapes-v2.source.json") == {
        "repository": "painter/shapes",
        "revision": COMMIT,
        "license": "creativeml-openrail-m",
        "file": "files/shapes-v2.safetensors",
    }
    assert [path.rpartition("/")[2] for path in handler.weights_requested()] == ["shapes-v2.safetensors"]
    assert choose_model(models, {}, in_bento=True).file == models / "shapes-v2.safetensors"


def test_one_file_that_is_no_model_is_refused_by_what_it_is(other_hub: tuple[str, type[Hub]], models: Path) -> None:
    endpoint, handler = other_hub
    write(handler.folder / "word.safetensors", {"emb_params": (2, 768)})
    finished = make_model(endpoint, "painter/shapes/word.safetensors", models)
    assert finished.returncode == 1
    assert "word.safetensors: a textual inversion or another single tensor, not a whole model" in finished.stderr


def test_one_file_that_is_cut_on_the_hub_is_refused(other_hub: tuple[str, type[Hub]], models: Path) -> None:
    endpoint, handler = other_hub
    file = write(handler.folder / "cut.safetensors", {"weight": (8,)})
    file.write_bytes(file.read_bytes()[:-1])
    finished = make_model(endpoint, "painter/shapes/cut.safetensors", models)
    assert finished.returncode == 1
    assert "cut.safetensors: has" in finished.stderr


def test_a_file_that_the_repository_lacks_is_answered_with_those_that_it_has(other_hub: tuple[str, type[Hub]], models: Path) -> None:
    endpoint, _ = other_hub
    said = refusal(endpoint, "painter/shapes/no.safetensors", models)
    assert "Nothing was downloaded: painter/shapes has no no.safetensors; its safetensors: safety_checker/model.fp16.safetensors," in said


def test_a_half_downloaded_file_is_neither_served_nor_passed_over(models: Path) -> None:
    (models / "x.safetensors.part").write_bytes(b"half")
    with pytest.raises(ModelFolderError, match=r"x.safetensors.part: half downloaded; run 'make model' again"):
        choose_model(models, {}, in_bento=False)


def test_a_repository_without_safetensors_is_refused_by_what_it_has(other_hub: tuple[str, type[Hub]], models: Path) -> None:
    endpoint, handler = other_hub
    for file in handler.folder.glob("*/*.safetensors"):
        file.unlink()
    said = refusal(endpoint, "painter/shapes", models)
    assert "painter/shapes has no .safetensors files, only safety_checker/model.bin, sd-v1-4.ckpt, text_encoder/model.bin" in said
    assert "pickles can run code when they are loaded" in said


def test_a_component_without_safetensors_is_named(other_hub: tuple[str, type[Hub]], models: Path) -> None:
    endpoint, handler = other_hub
    for file in handler.folder.glob("text_encoder/*.safetensors"):
        file.unlink()
    said = refusal(endpoint, "painter/shapes", models)
    assert "painter/shapes: text_encoder has no .safetensors file, only text_encoder/model.bin" in said
    assert not handler.weights_requested()


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (
            {"_class_name": "StableDiffusion3Pipeline"},
            "model_index.json: a StableDiffusion3Pipeline is not a Stable Diffusion 1.x, 2.x or XL",
        ),
        (
            {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True},
            "the refiner of Stable Diffusion XL cannot",
        ),
        ([], "model_index.json: not a JSON object"),
    ],
)
def test_a_model_of_another_kind_is_refused_before_its_weights_are_fetched(
    other_hub: tuple[str, type[Hub]], models: Path, index: object, said: str
) -> None:
    endpoint, handler = other_hub
    (handler.folder / "model_index.json").write_text(json.dumps(index))
    assert said in refusal(endpoint, "painter/shapes", models)
    assert not handler.weights_requested()


def test_a_repository_of_single_files_is_answered_with_how_to_fetch_one(other_hub: tuple[str, type[Hub]], models: Path) -> None:
    endpoint, handler = other_hub
    (handler.folder / "model_index.json").unlink()
    said = refusal(endpoint, "painter/shapes", models)
    assert "painter/shapes is not a model in diffusers' layout: it has no model_index.json" in said
    assert "MODEL=painter/shapes/safety_checker/model.fp16.safetensors" in said


def test_a_gated_repository_says_what_to_do_and_takes_a_token(other_hub: tuple[str, type[Hub]], models: Path) -> None:
    endpoint, handler = other_hub
    handler.is_gated = True
    said = refusal(endpoint, "painter/shapes", models)
    assert "accept the license at https://huggingface.co/painter/shapes" in said
    assert "set HF_TOKEN" in said
    finished = make_model(endpoint, "painter/shapes", models, changes={"HF_TOKEN": "hf_token"})
    assert finished.returncode == 0, finished.stderr
    check_model(models / "shapes")


def test_a_repository_or_revision_that_does_not_exist_is_named(other_hub: tuple[str, type[Hub]], models: Path) -> None:
    endpoint, _ = other_hub
    assert "The hub has no model painter/gone, or it is private: then set HF_TOKEN." in refusal(endpoint, "painter/gone", models)
    assert "painter/shapes has no revision v9." in refusal(endpoint, "painter/shapes@v9", models)


def test_a_folder_of_ones_own_and_one_from_another_repository_are_not_written_to(other_hub: tuple[str, type[Hub]], models: Path) -> None:
    endpoint, handler = other_hub
    own = models / "shapes" / "unet" / "mine.safetensors"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    finished = make_model(endpoint, "painter/shapes", models)
    assert finished.returncode == 1
    assert f"Nothing was downloaded: {models / 'shapes'} exists, and 'make model' did not fetch it: move it away first" in finished.stderr
    shutil.rmtree(models / "shapes")
    assert make_model(endpoint, "painter/shapes", models).returncode == 0
    handler.repository = "copyist/shapes"
    finished = make_model(endpoint, "copyist/shapes", models)
    assert finished.returncode == 1
    assert f"{models / 'shapes'} is from painter/shapes: move it away first" in finished.stderr


def test_beside_another_model_the_download_ends_with_how_to_serve_it(other_hub: tuple[str, type[Hub]], models: Path) -> None:
    endpoint, _ = other_hub
    shutil.copytree(DEMO_FOLDER, models / "v1_4")
    finished = make_model(endpoint, "painter/shapes", models)
    assert finished.returncode == 0, finished.stderr
    last = finished.stdout.splitlines()[-1]
    assert last == f"{models} holds 2 models. To serve this one, set SD_MODEL={models / 'shapes'}"
    with pytest.raises(ModelFolderError, match=r"holds 2 models \(shapes, v1_4\): set SD_MODEL"):
        choose_model(models, {}, in_bento=False)
    assert choose_model(models, {"SD_MODEL": str(models / "shapes")}, in_bento=False).name == "shapes"
