"""The start of a model process: what is measured and said, and what the next start knows."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from stable_diffusion.runner.startup import start_engine


@pytest.mark.alone
def test_the_engine_of_the_runner_measures_how_many_pictures_share_a_step_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.INFO, logger="stable_diffusion"):
        engine = start_engine(check_model(DEMO_FOLDER), "fp32", max_batch_size=10)
    engine.close()
    [said] = [record.getMessage() for record in caplog.records if "share a step" in record.getMessage()]
    found = re.match(r"Up to (\d+) images of 64x64 share a step: ([\d.]+)x the throughput of one at a time \(1: \d+ ms, 2: ", said)
    assert found, said
    # The demo model is launch-bound on every machine that it was tried on.
    assert int(found[1]) >= 2
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="stable_diffusion"):
        start_engine(check_model(DEMO_FOLDER), "fp32", max_batch_size=10).close()
    [recalled] = [record.getMessage() for record in caplog.records if "share a step" in record.getMessage()]
    assert recalled.startswith(said.removesuffix(".")), "the second start measures nothing"


def test_a_max_batch_size_of_one_is_said_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="stable_diffusion"):
        engine = start_engine(check_model(DEMO_FOLDER), "fp32", max_batch_size=1)
    engine.close()
    assert "Up to 1 images of 64x64 share a step: max_batch_size is 1." in caplog.messages
