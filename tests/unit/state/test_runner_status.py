"""What a runner says of itself arrives at API workers whole or not at all."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from stable_diffusion.state.runner_status import Execution, Placement, RunnerState, StepBatchLimit, living_runners


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SD_SHARED_FOLDER", str(tmp_path / "shared"))
    return tmp_path / "shared"


def test_several_runners_are_read_in_their_order(folder: Path) -> None:
    placement = Placement("a GPU", "float16", "epsilon", {"torch": "2"})
    second = RunnerState(2, "fp16", "demo", placement=placement)
    second.execution = Execution("graphs", "2x")
    second.enter("ready")
    second.set_batch_limit(StepBatchLimit(64, 64, 8, "8x"))
    first = RunnerState(1, "fp16", "demo")
    first.enter("loading weights")
    assert living_runners() == [first, second]
    assert sorted(file.name for file in folder.iterdir()) == ["runner-1.json", "runner-2.json"]


def test_a_cap_takes_the_place_of_the_one_before_and_only_the_last_ones_are_kept() -> None:
    state = RunnerState(1, "fp32", "demo")
    state.set_batch_limit(StepBatchLimit(64, 64, 8, "8x"))
    state.set_batch_limit(StepBatchLimit(64, 64, 2, "8 pictures did not fit into memory"))
    assert state.batch_limits == [StepBatchLimit(64, 64, 2, "8 pictures did not fit into memory")]
    for width in range(72, 72 + 8 * 40, 8):
        state.set_batch_limit(StepBatchLimit(width, 64, 1, "2 pictures did not fit into memory"))
    assert len(state.batch_limits) == 16
    assert (state.batch_limits[0].width, state.batch_limits[-1].width) == (64, 72 + 8 * 39)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"index": 1}', "null"])
def test_a_broken_file_is_no_runner(folder: Path, content: str) -> None:
    folder.mkdir()
    (folder / "runner-1.json").write_text(content)
    assert living_runners() == []


def test_a_runner_that_has_died_is_left_out() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    RunnerState(1, "fp32", "demo", pid=ended.pid).enter("ready")
    assert living_runners() == []


def test_a_folder_that_cannot_be_written_to_is_said_once_and_stops_nobody(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.write_text("in the way")
    state = RunnerState(1, "fp32", "demo")
    state.enter("loading weights")
    state.enter("ready")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert str(folder) not in caplog.text
