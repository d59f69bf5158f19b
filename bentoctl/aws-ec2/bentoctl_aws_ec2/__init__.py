"""The operator: the four functions that bentoctl 0.4.0 calls by name, with its parameters.

They report errors as click.ClickException, because after its own exceptions bentoctl exits with status 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from bentoctl_aws_ec2 import registry
from bentoctl_aws_ec2.costs import cost_notes
from bentoctl_aws_ec2.deployable import check_docker, image_size, take_bento
from bentoctl_aws_ec2.generate import VALUES_FILE, built_image, refuse_other_deployment, require_deployment, write_templates, write_values
from bentoctl_aws_ec2.specification import disk_warning, terraform_variables
from bentoctl_aws_ec2.state import resources_left


def generate(name: str, spec: Mapping[str, Any], template_type: str, destination_dir: str, values_only: bool = True) -> list[str]:
    """Writes the Terraform files and bentoctl.tfvars, or only the latter; returns the paths of written and up-to-date files.

    Says what a shared state costs. Warns if the image is built and the disk too small for it.
    """
    destination = Path(destination_dir)
    refuse_other_deployment(destination, name)
    image_tag = spec.get("image_tag") or built_image(destination)
    values = terraform_variables(name, {**spec, "image_tag": image_tag})
    if image_tag and (size := image_size(image_tag)) is not None and (warning := disk_warning(spec["disk_size_gb"], size)) is not None:
        click.echo(f"Warning: {warning}", err=True)
    for note in cost_notes(spec):
        click.echo(note)
    templates = [] if values_only else write_templates(destination)
    return [str(file) for file in [*templates, write_values(destination, values)]]


def create_deployable(bento_path: str, destination_dir: str, bento_metadata: Mapping[str, Any], overwrite_deployable: bool) -> str:
    """Returns the folder that Docker builds from, in `destination_dir`."""
    check_docker()
    return str(take_bento(Path(bento_path), Path(destination_dir)))


def create_repository(repository_name: str, operator_spec: Mapping[str, Any]) -> tuple[str, str, str]:
    """Checks the configuration again and creates the repository; returns its URL, and the user and password for `docker push`."""
    refuse_other_deployment(Path.cwd(), repository_name)
    terraform_variables(repository_name, {**operator_spec, "image_tag": None})
    return registry.create_repository(repository_name, operator_spec["region"])


def delete_repository(repository_name: str, operator_spec: Mapping[str, Any]) -> None:
    """Deletes the image repository, but only if it belongs to this folder's deployment and no other resource of that is left.

    bentoctl calls this even after a destroy that was refused or failed.
    """
    require_deployment(Path.cwd(), repository_name)
    left = resources_left()
    if left:
        raise click.ClickException(
            f"{len(left)} resources of the deployment still exist ({left[0]}, ...), so its image repository {repository_name} "
            f"was kept. Run: terraform apply -destroy -var-file {VALUES_FILE}, and then bentoctl destroy again"
        )
    registry.delete_repository(repository_name, operator_spec["region"])
