"""Writes what Terraform reads into the deployment's folder: the templates, as they are, and the values, bentoctl.tfvars.

Decides what happens to files that are there already. Which values are right is specification.py's matter.
"""

from __future__ import annotations

import filecmp
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import click

TEMPLATES = Path(__file__).parent / "terraform"
VALUES_FILE = "bentoctl.tfvars"
HEADER = """# Written by `bentoctl generate` and `bentoctl build`: change deployment_config.yaml and run generate again.

"""


def write_templates(destination: Path) -> list[Path]:
    """Copies the templates. Files that are there and differ are left alone, and nothing is written.

    Raises click.ClickException, which names them and says what to do.
    """
    sources = template_files()
    targets = [destination / source.relative_to(TEMPLATES) for source in sources]
    there = [target for target in targets if target.exists()]
    changed = [target for source, target in zip(sources, targets, strict=True) if target in there and not _same(source, target)]
    if changed:
        names = ", ".join(str(target.relative_to(destination)) for target in changed)
        raise click.ClickException(
            f"{names}: there already, and not as this operator writes it (you changed it, or the operator is newer).\n"
            "To keep it and refresh only the values:  bentoctl generate --values-only\n"
            f"To have it written new:                  rm {' '.join(str(target) for target in changed)}  and generate again"
        )
    for source, target in zip(sources, targets, strict=True):
        if target not in there:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    if len(there) == len(targets):
        click.echo(
            f"main.tf and the files beside it are there already and up to date: only {VALUES_FILE} is written. "
            "To have them written new, delete main.tf first."
        )
    return targets


def _same(source: Path, target: Path) -> bool:
    return filecmp.cmp(source, target, shallow=False)


def template_files() -> list[Path]:
    return sorted(file for file in TEMPLATES.rglob("*") if file.is_file() and "__pycache__" not in file.parts)


def refuse_other_deployment(destination: Path, deployment_name: str) -> None:
    """Terraform keeps one state per folder, so a second deployment in it would replace the first."""
    other = read_text_value(destination / VALUES_FILE, "deployment_name")
    if other and other != deployment_name:
        raise click.ClickException(
            f"this folder holds the deployment {other}; Terraform would replace it by {deployment_name}. "
            "Give each deployment a folder of its own: mkdir NAME, cd NAME, and generate there with -f ../deployment_config.yaml"
        )


def require_deployment(destination: Path, deployment_name: str) -> None:
    """For what cannot be undone: the folder must be the deployment's own."""
    there = read_text_value(destination / VALUES_FILE, "deployment_name")
    if there != deployment_name:
        what = f"holds the deployment {there}" if there else f"has no {VALUES_FILE}"
        raise click.ClickException(
            f"this folder {what}, so the images of {deployment_name} were not touched; go to the folder of {deployment_name}"
        )


def write_values(destination: Path, values: Mapping[str, object]) -> Path:
    file = destination / VALUES_FILE
    width = max(len(name) for name in values)
    file.write_text(HEADER + "".join(f"{name:<{width}} = {to_hcl(value)}\n" for name, value in values.items()), encoding="utf-8")
    return file


def built_image(destination: Path) -> str | None:
    """The image that the last `bentoctl build` put into bentoctl.tfvars: a later generate must not lose it."""
    return read_text_value(destination / VALUES_FILE, "image_tag")


def read_text_value(file: Path, name: str) -> str | None:
    """A value of a file that write_values wrote; only for values that need no escapes."""
    if not file.exists():
        return None
    match = re.search(rf'^{name} *= "([^"\\]+)"$', file.read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match else None


def to_hcl(value: object) -> str:
    """JSON is HCL as well, but for ${ and %{, which would begin a template."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{to_hcl(key)} = {to_hcl(item)}" for key, item in value.items()) + " }" if value else "{}"
    if isinstance(value, list):
        return "[" + ", ".join(to_hcl(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("${", "$${").replace("%{", "%%{")
