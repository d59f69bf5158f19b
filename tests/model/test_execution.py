"""How a start chooses the way of computing: named, kept, tried, or left because a try ended a process."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stable_diffusion.engine import choosing
from stable_diffusion.engine.calibration import BatchLimit
from stable_diffusion.engine.choosing import Choice, Trial
from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.loading import Parts
from stable_diffusion.runner.execution import set_up_execution
from stable_diffusion.runner.measurement_cache import Key, has_ended_a_process, keep_way, recall_way, trying
from stable_diffusion.state.runner_status import Execution
from tests.model.stand_in_graphs import StandInGraphs
from tests.pages import ROOT

KEY: Key = {"device": "a GPU", "dtype": "torch.float16", "torch": "2.13.0"}
SIZE = (64, 64)


@pytest.fixture(autouse=True)
def empty_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


class Start:
    """A start on the demo model, on a CPU that says it is `device`. Batch limits are 2."""

    def __init__(self, parts: Parts) -> None:
        self.graphs = StandInGraphs()
        self.denoiser = Denoiser(parts, lambda: self.graphs)
        self.limits_asked_for: list[str] = []

    def set_up(self, setting: str, device: str = "cuda", key: Key = KEY, step_s: float = 0.01) -> Execution:
        def batch_limit_in(way: str) -> BatchLimit:
            assert self.denoiser.call_unet.way.name == way, "the batch limit is that of another way"
            self.limits_asked_for.append(way)
            return BatchLimit(2, "")

        execution, _ = set_up_execution(
            self.denoiser, device, "torch.float16", SIZE, 3, setting, key, batch_limit_in, step_s, watchdog=None
        )
        assert self.denoiser.call_unet.way.name == execution.way
        return execution


@pytest.fixture
def start(demo_parts: Parts) -> Start:
    return Start(demo_parts)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Callable[[Choice], list[list[str]]]:
    """Trials end with the given choice; returns the names of the ways that were tried, for each start."""

    def end_with(choice: Choice) -> list[list[str]]:
        asked: list[list[str]] = []

        def choose(usual: Trial[torch.Tensor], others: list[Trial[torch.Tensor]], *rest: object, **options: object) -> Choice:
            asked.append([trial.name for trial in others])
            return choice

        monkeypatch.setattr(choosing, "choose", choose)
        return asked

    return end_with


def test_a_named_way_is_used_and_nothing_is_tried(start: Start, chosen: Callable[[Choice], list[list[str]]]) -> None:
    asked = chosen(Choice("eager", ""))
    assert start.set_up("graphs") == Execution("graphs", "SD_EXECUTION is graphs")
    assert start.limits_asked_for == ["graphs"]
    assert not asked
    start.denoiser.compute(start.denoiser.sample_inputs(3, *SIZE))
    assert start.graphs.replays == 1, "steps of up to the greatest number of jobs are recorded"


def test_a_named_way_that_the_device_cannot_do_is_said_and_steps_are_eager(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    assert start.set_up("graphs", device="cpu") == Execution("eager", "not graphs: CUDA graphs need a GPU")
    assert [record.levelno for record in caplog.records if "Steps are computed" in record.getMessage()] == [logging.WARNING]


def test_a_named_way_that_fails_is_said_and_steps_are_eager(demo_parts: Parts) -> None:
    def broken() -> StandInGraphs:
        raise RuntimeError("on purpose")

    start = Start(demo_parts)
    start.denoiser = Denoiser(demo_parts, broken)
    assert start.set_up("channels_last+graphs") == Execution("eager", "not channels_last+graphs, which could not be set up: RuntimeError")


def test_a_choice_is_kept_and_the_next_start_tries_nothing(start: Start, chosen: Callable[[Choice], list[list[str]]]) -> None:
    asked = chosen(Choice("graphs", "2.00x the speed of eager"))
    assert start.set_up("auto") == Execution("graphs", "2.00x the speed of eager")
    assert start.limits_asked_for == ["eager", "graphs"], "trials use the batch limit of eager, steps that of the chosen way"
    assert asked[0][:3] == ["graphs", "channels_last", "channels_last+graphs"]
    again = start.set_up("auto")
    assert again.way == "graphs"
    assert again.reason.startswith("2.00x the speed of eager; measured on 20")
    assert len(asked) == 1


@pytest.mark.parametrize("change", [{"torch": "2.14.0"}, {"device": "another"}, {"dtype": "torch.float32"}, {"unet": "another"}])
def test_a_choice_of_other_conditions_is_not_used(
    start: Start, chosen: Callable[[Choice], list[list[str]]], change: dict[str, str | int]
) -> None:
    keep_way(KEY | change, "graphs", "in another world")
    asked = chosen(Choice("eager", "nothing gains"))
    assert start.set_up("auto") == Execution("eager", "nothing gains")
    assert len(asked) == 1
    assert start.limits_asked_for == ["eager"]


def test_a_choice_that_memory_limited_is_not_kept(start: Start, chosen: Callable[[Choice], list[list[str]]]) -> None:
    chosen(Choice("eager", "graphs: out of memory", limited_by_memory=True))
    start.set_up("auto")
    assert recall_way(KEY) is None


def test_on_this_cpu_eager_stays_and_the_model_is_as_before(start: Start, demo_parts: Parts) -> None:
    layout = {name: parameter.stride() for name, parameter in demo_parts.unet.named_parameters()}
    inputs = start.denoiser.sample_inputs(2, *SIZE)
    expected = start.denoiser.compute(inputs)
    execution = start.set_up("auto", device="cpu")
    assert execution.way == "eager"
    assert "channels_last: its result differs by" in execution.reason
    assert layout == {name: parameter.stride() for name, parameter in demo_parts.unet.named_parameters()}
    assert torch.equal(start.denoiser.compute(inputs), expected)


def test_a_slow_cpu_tries_nothing(start: Start, chosen: Callable[[Choice], list[list[str]]]) -> None:
    asked = chosen(Choice("eager", ""))
    assert start.set_up("auto", device="cpu", step_s=15.0).reason == "a step takes 15.0 s: there is no time to try other ways"
    assert not asked


def test_all_ways_of_a_gpu_are_really_tried_and_those_that_fail_are_left(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the stand-in for graphs, which is no faster or slower than it happens to be. Compiling is left out for want of time."""
    monkeypatch.setattr("stable_diffusion.runner.execution.BUDGET_S", {"cuda": 40.0})
    with caplog.at_level(logging.INFO, "stable_diffusion"):
        execution = start.set_up("auto")
    kept = recall_way(KEY)
    assert kept is not None
    assert kept[0] == execution.way
    assert "The way of computing channels_last+compile+graphs is left: trying it may take 50 s" in caplog.text
    for name in ("graphs", "channels_last", "channels_last+graphs"):
        assert name == execution.way or f"The way of computing {name} is left: " in caplog.text


def test_a_way_that_ended_a_process_is_not_tried_again(
    start: Start, chosen: Callable[[Choice], list[list[str]]], caplog: pytest.LogCaptureFixture
) -> None:
    """A real process whose device hangs while it records: the watchdog ends it, and the next start knows which way it was."""
    first = subprocess.run([sys.executable, "-c", HANGS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert first.returncode == 1, first.stderr
    assert "Timeout" in first.stderr
    assert has_ended_a_process(KEY, "graphs")
    asked = chosen(Choice("channels_last", "1.10x the speed of eager"))
    assert start.set_up("auto").reason == "1.10x the speed of eager; graphs: a process ended while it tried it"
    assert "graphs" not in asked[0]
    assert "channels_last+graphs" in asked[0]


HANGS = f"""
import time
import stable_diffusion.runner.execution as execution
from stable_diffusion.engine.calibration import BatchLimit
from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.loading import load
from stable_diffusion.engine.watchdog import Watchdog
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
execution.BUDGET_S = {{"cuda": 1.0}}
execution._GRACE_S = 1.0
denoiser = Denoiser(load(check_model(DEMO_FOLDER), "fp32"), lambda: time.sleep(600))
execution.set_up_execution(
    denoiser, "cuda", "torch.float16", (64, 64), 2, "auto", {KEY!r}, lambda way: BatchLimit(2, ""), 0.01, Watchdog(60.0)
)
"""


def test_another_process_that_is_still_trying_is_no_reason_to_leave_a_way() -> None:
    with trying(KEY, "graphs"):
        assert not has_ended_a_process(KEY, "graphs")
    assert not has_ended_a_process(KEY, "graphs")
