"""Runs the real Terraform on a folder of configuration, with a stand-in for the AWS provider and without any network.

The stand-in has the real provider's schema for the types the folder uses, so Terraform refuses what does not fit it. Nothing is
written into the folder: what Terraform keeps for itself goes beside the stand-in.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.deployment.aws_schema import read_schema

SCHEMA_WHEEL = Path(__file__).parents[2] / ".venv" / "aws-provider-schema" / "cdktf_cdktf_provider_aws-21.22.1-py3-none-any.whl"
PROVIDER_PROGRAM = Path(__file__).with_name("aws_provider.py")
SECONDS_TO_RUN = 120

CONFIGURATION_FILES = ("*.tf", "*.tftest.hcl", "*.tfmock.hcl")
RESOURCE_TYPE = re.compile(r'^\s*(?:resource|mock_resource)\s+"(aws_\w+)"', re.MULTILINE)
DATA_SOURCE_TYPE = re.compile(r'^\s*(?:data|mock_data)\s+"(aws_\w+)"', re.MULTILINE)


def find_terraform() -> Path | None:
    found = shutil.which("terraform")
    return Path(found) if found else None


@dataclass(frozen=True)
class StandIn:
    """A folder with the stand-in provider and Terraform's own files."""

    folder: Path

    @property
    def command_line_configuration(self) -> Path:
        return self.folder / "terraform.rc"

    @property
    def schema(self) -> Path:
        return self.folder / "schema.json"

    def run(self, configuration: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Runs `terraform ARGUMENTS` in the folder of a configuration; the result has both outputs and the return code."""
        terraform = find_terraform()
        if terraform is None:
            raise FileNotFoundError("terraform is not installed")
        # Somebody's own settings (TF_LOG, TF_VAR_..., TF_CLI_ARGS) must not decide whether a test passes.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
        environment |= {
            "TF_CLI_CONFIG_FILE": str(self.command_line_configuration),
            "TF_DATA_DIR": str(self.folder / "data"),
            "TF_DISABLE_PLUGIN_TLS": "1",
            "TF_IN_AUTOMATION": "1",
            "TF_CLI_ARGS": "-no-color",
            "TF_INPUT": "0",
            "CHECKPOINT_DISABLE": "1",
        }
        return subprocess.run(
            [terraform, *arguments], cwd=configuration, env=environment, capture_output=True, text=True, timeout=SECONDS_TO_RUN
        )


def prepare(configuration: Path, folder: Path) -> StandIn:
    """Puts a stand-in provider for the configuration, and everything below it, into an existing folder.

    `terraform init` is neither needed nor possible: it would look for the provider in the registry.
    """
    resource_types, data_source_types = used_types(configuration)
    stand_in = StandIn(folder)
    stand_in.schema.write_text(json.dumps(read_schema(SCHEMA_WHEEL, resource_types, data_source_types)), encoding="utf-8")
    launcher = folder / "terraform-provider-aws"
    command = shlex.join([sys.executable, str(PROVIDER_PROGRAM), str(stand_in.schema)])
    launcher.write_text(f"#!/bin/sh\nexec {command}\n", encoding="utf-8")
    launcher.chmod(0o755)
    stand_in.command_line_configuration.write_text(
        f"""provider_installation {{
  dev_overrides {{
    "hashicorp/aws" = {json.dumps(str(folder))}
  }}
  direct {{}}
}}
""",
        encoding="utf-8",
    )
    # Local modules must be registered first. Errors in the configuration are ignored here, because the next command reports them.
    stand_in.run(configuration, "get")
    return stand_in


def used_types(configuration: Path) -> tuple[set[str], set[str]]:
    """The resource types and data source types that a configuration, its modules and its tests name."""
    files = [file for pattern in CONFIGURATION_FILES for file in configuration.rglob(pattern)]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    return set(RESOURCE_TYPE.findall(text)), set(DATA_SOURCE_TYPE.findall(text))
