"""Lists the resources in the current folder's Terraform state. The outputs would not do: Terraform removes them before the resources."""

from __future__ import annotations

import subprocess

import click


def resources_left() -> list[str]:
    """Addresses of the resources in Terraform's state; an empty list where there is none."""
    try:
        listed = subprocess.run(["terraform", "state", "list"], capture_output=True, text=True, check=False)
    except FileNotFoundError as reason:
        raise click.ClickException("terraform is not installed, or not on PATH") from reason
    if listed.returncode != 0 and "No state file was found" not in listed.stderr:
        raise click.ClickException(f"Terraform cannot list the deployed resources: {listed.stderr.strip()}")
    return [address for address in listed.stdout.split() if ".data." not in f".{address}"]
