"""Prepares the build context of the image, which is the bento itself, and checks that Docker can build it. Knows the built image's size."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import click

DOCKERFILE = Path("env") / "docker" / "Dockerfile"


def check_docker() -> None:
    """Raises click.ClickException that names what is missing; BentoML would fail halfway through, or with a traceback."""
    docker = shutil.which("docker")
    if docker is None:
        raise click.ClickException("docker is not installed, or not on PATH")
    if subprocess.run([docker, "buildx", "version"], capture_output=True, check=False).returncode != 0:
        raise click.ClickException("docker has no buildx plugin: install docker-buildx (or docker-buildx-plugin)")
    # Docker would push provenance attestations as separate images, which count towards those that the repository keeps.
    os.environ.setdefault("BUILDX_NO_DEFAULT_ATTESTATIONS", "1")
    daemon = subprocess.run([docker, "version", "--format", "{{.Server.Version}}"], capture_output=True, text=True, check=False)
    if daemon.returncode != 0:
        raise click.ClickException(f"the Docker daemon does not respond: {daemon.stderr.strip()}")


def take_bento(bento: Path, destination: Path) -> Path:
    """Moves the files of `bento` to `destination`: bentoctl deletes `bento`, its own copy, before it builds."""
    if not (bento / DOCKERFILE).is_file():
        raise click.ClickException(f"the bento has no {DOCKERFILE}; another version of BentoML built it")
    deployable = destination / "bento"
    deployable.mkdir()
    for child in bento.iterdir():
        shutil.move(child, deployable)
    return deployable


def image_size(image_tag: str) -> int | None:
    """The size in bytes of an image that this computer's Docker has; None if it has no such image, or there is no Docker."""
    docker = shutil.which("docker")
    if docker is None:
        return None
    command = [docker, "image", "inspect", "--format", "{{.Size}}", image_tag]
    inspected = subprocess.run(command, capture_output=True, text=True, check=False)
    size = inspected.stdout.strip()
    return int(size) if inspected.returncode == 0 and size.isdecimal() else None
