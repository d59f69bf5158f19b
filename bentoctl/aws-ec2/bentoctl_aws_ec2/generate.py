"""Writes Terraform's input into the deployment's folder: copies of the templates, and the values, bentoctl.tfvars.

Decides what happens to existing files. specification.py checks the values.
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
    """Copies the templates. If an existing file differs, writes nothing.

    Raises click.ClickException, which names the files that differ and says what to do.
    """
    sources = template_files()
    targets = [destination / source.relative_to(TEMPLATES) for source in sources]
    existing = [target for target in targets if target.exists()]
    changed = [target for source, target in zip(sources, targets, strict=True) if target in existing and not _same(source, target)]
    if changed:
        names = ", ".join(str(target.relative_to(destination)) for target in changed)
        raise click.ClickException(
            f"{names}: differs from what this operator writes (you changed it, or the operator is newer).\n"
            "To keep it and update only the values:  bentoctl generate --values-only\n"
            f"To replace it:                         rm {' '.join(str(target) for target in changed)}  and generate again"
        )
    for source, target in zip(sources, targets, strict=True):
        if target not in existing:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    if len(existing) == len(targets):
        click.echo(f"main.tf and the other templates are up to date: only {VALUES_FILE} is written. To replace them, delete main.tf first.")
    return targets


def _same(source: Path, target: Path) -> bool:
    return filecmp.cmp(source, target, shallow=False)


def template_files() -> list[Path]:
    return sorted(file for file in TEMPLATES.rglob("*") if file.is_file() and "__pycache__" not in file.parts)


def refuse_other_deployment(destination: Path, deployment_name: str) -> None:
    """Refuse a second deployment in a folder: Terraform keeps one state per folder, so it would replace the first."""
    other = read_text_value(destination / VALUES_FILE, "deployment_name")
    if other and other != deployment_name:
        raise click.ClickException(
            f"this folder belongs to the deployment {other}; Terraform would replace it with {deployment_name}. "
            "Use a separate folder for each deployment: mkdir NAME, cd NAME, and generate there with -f ../deployment_config.yaml"
        )


def require_deployment(destination: Path, deployment_name: str) -> None:
    """Refuse an action that cannot be undone, unless the folder belongs to the deployment."""
    found = read_text_value(destination / VALUES_FILE, "deployment_name")
    if found != deployment_name:
        what = f"belongs to the deployment {found}" if found else f"has no {VALUES_FILE}"
        raise click.ClickException(
            f"this folder {what}, so the images of {deployment_name} were kept; run the command in the folder of {deployment_name}"
        )


def write_values(destination: Path, values: Mapping[str, object]) -> Path:
    file = destination / VALUES_FILE
    width = max(len(name) for name in values)
    file.write_text(HEADER + "".join(f"{name:<{width}} = {to_hcl(value)}\n" for name, value in values.items()), encoding="utf-8")
    return file


def built_image(destination: Path) -> str | None:
    """The image that the last `bentoctl build` wrote to bentoctl.tfvars: a later generate must keep it."""
    return read_text_value(destination / VALUES_FILE, "image_tag")


def read_text_value(file: Path, name: str) -> str | None:
    """A value from a file that write_values has written. Works only for values without escapes."""
    if not file.exists():
        return None
    match = re.search(rf'^{name} *= "([^"\\]+)"$', file.read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match else None


def to_hcl(value: object) -> str:
    """HCL for a value: JSON, in which ${ and %{ are escaped, because they would begin a template."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{to_hcl(key)} = {to_hcl(item)}" for key, item in value.items()) + " }" if value else "{}"
    if isinstance(value, list):
        return "[" + ", ".join(to_hcl(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("${", "$${").replace("%{", "%%{")
