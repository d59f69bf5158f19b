"""Runs what a person runs to deploy (bentoctl, the machine's script), with homes of their own and stand-ins on PATH."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.http.servers import ROOT, environment

OPERATOR = ROOT / "bentoctl" / "aws-ec2"
TEMPLATES = OPERATOR / "bentoctl_aws_ec2" / "terraform"
TOOLS = ROOT / ".venv" / "tools" / "bin"
BENTOCTL = Path(sys.executable).with_name("bentoctl")


def bentoctl(
    home: Path,
    folder: Path,
    *arguments: str,
    changes: Mapping[str, str] | None = None,
    typed: str | None = None,
    timeout_s: float = 180,
) -> subprocess.CompletedProcess[str]:
    """`bentoctl ARGUMENTS` in `folder`, with `home` as BENTOCTL_HOME and BENTOML_HOME."""
    home.mkdir(exist_ok=True)
    variables = environment(home, {"BENTOCTL_HOME": str(home), "PYTHONWARNINGS": "ignore", "COLUMNS": "400", **(changes or {})})
    return subprocess.run(
        [str(BENTOCTL), *arguments],
        cwd=folder,
        env=variables,
        input=typed or "",
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def stand_in(folder: Path, name: str, script: str) -> Path:
    """An executable `name` in `folder` that appends its arguments to calls.log beside it and then runs `script` (bash)."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / name
    program.write_text(f'#!/bin/bash\necho "{name} $*" >> "{folder}/calls.log"\n{script}\n')
    program.chmod(0o755)
    return program


def calls(folder: Path) -> list[str]:
    log = folder / "calls.log"
    return log.read_text().splitlines() if log.exists() else []


def path_with(folders: Iterable[Path]) -> str:
    return os.pathsep.join([*map(str, folders), os.environ["PATH"]])
