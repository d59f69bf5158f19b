"""What `make serve` says to try is an address that curl takes, and what `make model` downloads."""

from __future__ import annotations

import os
import re
import subprocess
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.http.servers import free_port

ROOT = Path(__file__).parents[2]
REFUSED = 7  # curl's exit status when nobody listens; 3 is an address that it cannot read


@pytest.mark.parametrize(
    ("host", "written"),
    [
        ("::1", "[::1]"),
        ("::", "[::1]"),
        ("0.0.0.0", "127.0.0.1"),
        ("::ffff:127.0.0.1", "[::ffff:127.0.0.1]"),
        ("2001:db8::1", "[2001:db8::1]"),
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "localhost"),
    ],
)
def test_the_address_that_is_printed_can_be_asked(host: str, written: str) -> None:
    port = free_port()
    command = ["make", "--dry-run", "serve", f"HOST={host}", f"PORT={port}"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    addresses = re.findall(r"http://[^\s']+", printed)
    assert addresses == [f"http://{written}:{port}/txt2img", f"http://{written}:{port}/ui"]
    assert urlsplit(addresses[0]).netloc == f"{written}:{port}"
    assert f"--host {host} --port {port}" in printed
    if host != "2001:db8::1":  # no address of this machine
        assert subprocess.run(["curl", "--silent", "--max-time", "5", addresses[0]], check=False).returncode == REFUSED


@pytest.mark.parametrize("variables", [{"SD_API_KEYS": "alice:$(0123456789abcdef"}, {"SD_API_KEYS_FILE": "/a/file"}])
def test_with_keys_the_printed_command_has_a_place_for_one(variables: dict[str, str]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SD_")}
    command = ["make", "--dry-run", "serve"]
    run = partial(subprocess.run, command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Authorization" not in run(env=environment).stdout
    printed = run(env=environment | variables).stdout
    assert "try (KEY is your API key):" in printed
    assert "/txt2img' -H 'Authorization: Bearer KEY' -H 'Content-Type" in printed


@pytest.mark.parametrize(
    ("variables", "arguments"),
    [
        ([], "fp32 'v1.4' fp32/models"),
        (["PRECISION=fp16"], "fp16 'v1.4' fp16/models"),
        (["MODEL=owner/name/a file.safetensors@main", "PRECISION=fp16"], "fp16 'owner/name/a file.safetensors@main' fp16/models"),
    ],
)
def test_a_model_is_downloaded_into_the_folder_of_its_precision(variables: list[str], arguments: str) -> None:
    environment = {"PATH": os.environ["PATH"]}
    command = ["make", "--dry-run", "model", *variables]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment).stdout
    assert f"-m stable_diffusion.models.download {arguments}\n" in printed
