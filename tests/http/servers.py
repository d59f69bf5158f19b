"""Starts the service as a user does, in processes of its own, and ends it by its own process id."""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

ROOT = Path(__file__).parents[2]
BENTOML = Path(sys.executable).with_name("bentoml")
READY_TIMEOUT_S = 120
STOP_TIMEOUT_S = 30
# All of it is plain HTTP: to read the certificates of all authorities would take 50 ms for each client.
PLAIN_HTTP: dict[str, Any] = {"trust_env": False, "verify": False}


@dataclass(frozen=True)
class Server:
    url: str
    log_file: Path
    process: subprocess.Popen[bytes]

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **PLAIN_HTTP)

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return str(parts.hostname), int(parts.port or 0)

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")


def environment(home: Path, changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """A plain environment with a BentoML home of its own and nothing phoning home."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BENTOML_", "SD_", "PYTEST_"))}
    bin_folder = str(Path(sys.executable).parent)
    return kept | {
        "PATH": f"{bin_folder}{os.pathsep}{kept['PATH']}",
        "BENTOML_HOME": str(home),
        "BENTOML_DO_NOT_TRACK": "True",
        **(changes or {}),
    }


def free_port() -> int:
    """At random below the ports that Linux gives to clients: thousands of connections of a test beside this one could take one of those."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def serve(folder: Path, target: str, home: Path, changes: Mapping[str, str] | None = None, port: int | None = None) -> Iterator[Server]:
    """`bentoml serve TARGET --production` in `folder` until the block ends."""
    port = port or free_port()
    home.mkdir(parents=True, exist_ok=True)
    log_file = home / f"serve-{port}.log"
    command = [sys.executable, "-m", "bentoml", "serve", target, "--production", "--host", "127.0.0.1", "--port", str(port)]
    with log_file.open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(home, changes), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = Server(f"http://127.0.0.1:{port}", log_file, process)
    try:
        wait_until_ready(server)
        yield server
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the server; SIGKILL to it and all that it started if that was not enough."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a server and all that it started, as when its machine goes. The workers have sessions of their own and would live on."""
    if process.poll() is None:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            member.kill()
    process.wait()


def wait_until_ready(server: Server, page: str = "/readyz") -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    with server.client() as client:
        while time.monotonic() < deadline:
            if server.process.poll() is not None:
                raise RuntimeError(f"the server ended with {server.process.returncode}:\n{server.log}")
            try:
                if client.get(page).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.2)
    raise RuntimeError(f"not ready after {READY_TIMEOUT_S} s:\n{server.log}")


def wait_until_drawing(client: httpx.Client, poll_s: float) -> None:
    """Until an API worker is answering a /txt2img."""
    while not re.search(r'request_in_progress\{endpoint="/txt2img".* 1\.0', client.get("/metrics").text):
        time.sleep(poll_s)


def only_code(folder: str, names: list[str]) -> set[str]:
    """For copies of the service's folders with shutil.copytree: leaves out the weights that lie there, and bytecode."""
    return set(names) if Path(folder).name == "models" and Path(folder).parent.parent == ROOT else {"__pycache__"}


def build_bento(folder: Path, home: Path) -> Path:
    """`bentoml build` in the folder of a precision, into the store at `home`. Returns where the bento lies."""
    finished = subprocess.run(
        [str(BENTOML), "build"], cwd=folder, env=environment(home), capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr + finished.stdout
    # Not from `bentoml get --output path`, which breaks a long path at the width of a terminal.
    versions = home / "bentos" / f"stable_diffusion_{folder.name}"
    return versions / (versions / "latest").read_text().strip()
