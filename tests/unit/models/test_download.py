"""`make model` against a small stand-in for the Hugging Face hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
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
from stable_diffusion.models.download import REPOSITORY, REVISION
from stable_diffusion.models.folder import DEMO_FOLDER, check_model


class Hub(BaseHTTPRequestHandler):
    """Serves a folder as the hub serves a repository. With `stall_after_bytes` it stops once in the middle of a large file."""

    folder: ClassVar[Path]
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

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.requested.append((self.command, path, self.headers.get("Range")))
        api = f"/api/models/{REPOSITORY}/revision/{REVISION}"
        resolve = f"/{REPOSITORY}/resolve/{REVISION}/"
        if path == api:
            self._send_json(
                {"id": REPOSITORY, "modelId": REPOSITORY, "sha": REVISION, "siblings": [self._sibling(name) for name in self._names()]}
            )
        elif path.startswith(resolve) and (self.folder / path.removeprefix(resolve)).is_file():
            self._send_file(path.removeprefix(resolve), with_body)
        else:
            self.send_response(404)
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
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not with_body:
            return
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
    safety_checker = folder / "safety_checker"
    safety_checker.mkdir()
    shutil.copy(folder / "text_encoder" / "config.json", safety_checker)
    shutil.copy(folder / "text_encoder" / "model.safetensors", safety_checker)
    for file in [*folder.glob("*/*.safetensors")]:
        shutil.copy(file, file.with_suffix(".fp16.safetensors"))
        file.with_suffix(".bin").write_bytes(b"a pickle")
    (folder / "sd-v1-4.ckpt").write_bytes(b"another pickle")

    class ThisHub(Hub):
        pass

    ThisHub.folder, ThisHub.requested, ThisHub.stall_after_bytes = folder, [], None
    ThisHub.stalled, ThisHub.released = threading.Event(), threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), ThisHub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", ThisHub
    server.shutdown()
    thread.join()
    server.server_close()


def write_safetensors(file: Path, size: int) -> None:
    """A valid file of one tensor with `size` bytes."""
    header = json.dumps({"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + os.urandom(size))


def make_model(endpoint: str, precision: str, folder: Path) -> subprocess.CompletedProcess[str]:
    process = start_make_model(endpoint, precision, folder)
    output, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def start_make_model(endpoint: str, precision: str, folder: Path) -> subprocess.Popen[str]:
    """What `make model` runs, against another hub."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder.parent),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "stable_diffusion.models.download", precision, str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("precision", "suffix"), [("fp32", ".safetensors"), ("fp16", ".fp16.safetensors")])
def test_one_precision_is_fetched_as_safetensors_only(hub: tuple[str, type[Hub]], tmp_path: Path, precision: str, suffix: str) -> None:
    endpoint, _ = hub
    folder = tmp_path / "v1_4"
    finished = make_model(endpoint, precision, folder)
    assert finished.returncode == 0, finished.stderr
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
    assert check_model(folder).variant == (None if precision == "fp32" else "fp16")
    assert "OpenRAIL" in finished.stdout
    assert re.search(r"Files: 100%", finished.stderr), "no progress bar"


def test_a_broken_download_goes_on_where_it_stopped_and_a_second_run_fetches_nothing(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    endpoint, handler = hub
    folder = tmp_path / "v1_4"
    write_safetensors(handler.folder / "unet" / "diffusion_pytorch_model.safetensors", 24_000_000)
    handler.stall_after_bytes = 15_000_000  # the client writes in pieces of 10 MB
    first = start_make_model(endpoint, "fp32", folder)
    assert handler.stalled.wait(60)
    time.sleep(1)  # what was sent reaches the disk
    first.kill()
    first.communicate()
    handler.released.set()
    with pytest.raises(ModelFolderError):
        check_model(folder)
    assert not [path for _, path, span in handler.requested if span]
    again = make_model(endpoint, "fp32", folder)
    assert again.returncode == 0, again.stderr
    resumed = [span for command, path, span in handler.requested if command == "GET" and path.endswith(".safetensors") and span]
    assert resumed, "no file was resumed"
    check_model(folder)
    handler.requested.clear()
    assert make_model(endpoint, "fp32", folder).returncode == 0
    assert not [path for command, path, _ in handler.requested if command == "GET" and path.endswith(".safetensors")]


def test_a_file_that_differs_from_the_hubs_is_found_and_fetched_again(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    endpoint, _ = hub
    folder = tmp_path / "v1_4"
    assert make_model(endpoint, "fp32", folder).returncode == 0
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    finished = make_model(endpoint, "fp32", folder)
    assert finished.returncode == 0, finished.stderr
    assert file.read_bytes() == (DEMO_FOLDER / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(tmp_path: Path) -> None:
    finished = make_model("http://127.0.0.1:9", "fp32", tmp_path / "v1_4")
    assert finished.returncode == 1
    assert "The download stopped" in finished.stderr
    assert "Traceback" not in finished.stderr
