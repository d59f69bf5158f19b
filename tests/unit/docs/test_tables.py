"""The pages' tables are those that the code has now: `make docs` writes them."""

from __future__ import annotations

import subprocess
import sys

from stable_diffusion.api.openai.parameters import OpenaiParameters
from stable_diffusion.core.requests import ImageToImageRequest
from stable_diffusion.core.schedulers import SCHEDULERS
from tests.pages import PAGES, ROOT


def test_no_table_is_stale() -> None:
    # A process of its own: the table of metrics creates them.
    finished = subprocess.run([sys.executable, "-m", "docs.tables", "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_every_field_and_scheduler_has_its_row() -> None:
    for field in ImageToImageRequest.model_fields:
        assert f"\n| `{field}` |" in PAGES["docs/api.md"]
    for short_names in SCHEDULERS.values():
        assert f"\n| `{short_names[0]}` |" in PAGES["docs/api.md"]
    for parameter in OpenaiParameters.model_fields:
        assert f"\n| `{parameter}` |" in PAGES["docs/openai.md"]
