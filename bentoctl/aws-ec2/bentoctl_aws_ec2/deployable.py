"""The build context of the image: the bento as it is, at a place where it stays; and whether Docker is there to build it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import click

DOCKERFILE = Path("env") / "docker" / "Dockerfile"


def check_docker() -> None:
    """Raises click.ClickException that says what is missing; BentoML itself would end with a traceback or halfway through."""
    docker = shutil.which("docker")
    if docker is None:
        raise click.ClickException("docker is not installed, or not on PATH")
    if subprocess.run([docker, "buildx", "version"], capture_output=True, check=False).returncode != 0:
        raise click.ClickException("docker has no buildx plugin: install docker-buildx (or docker-buildx-plugin)")
    # Docker would push provenance as images of their own, which count against those that the repository keeps.
    os.environ.setdefault("BUILDX_NO_DEFAULT_ATTESTATIONS", "1")
    daemon = subprocess.run([docker, "version", "--format", "{{.Server.Version}}"], capture_output=True, text=True, check=False)
    if daemon.returncode != 0:
        raise click.ClickException(f"the Docker daemon does not answer: {daemon.stderr.strip()}")


def take_bento(bento: Path, destination: Path) -> Path:
    """bentoctl deletes `bento`, its own copy, before it builds; moving what is in it spares another copy of the weights."""
    if not (bento / DOCKERFILE).is_file():
        raise click.ClickException(f"the bento has no {DOCKERFILE}; it was built by another version of BentoML")
    deployable = destination / "bento"
    deployable.mkdir()
    for child in bento.iterdir():
        shutil.move(child, deployable)
    return deployable
