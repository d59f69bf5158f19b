"""The status of each runner, as a small file in the server's shared folder: runners write it, API workers read it.

It contains no prompt and no path. Does not depend on HTTP or metrics and imports no torch.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

import psutil

from stable_diffusion.state.folder import shared_folder

logger = logging.getLogger("stable_diffusion")

Stage = Literal["starting", "loading weights", "warming up", "measuring the cap", "ready"]
STAGES: tuple[Stage, ...] = get_args(Stage)  # in order

_MAX_BATCH_LIMITS = 16  # the native size and the last sizes that ran out of memory


@dataclass(frozen=True)
class StepBatchLimit:
    """How many images of this size may share a step, and why. Sizes in pixels."""

    width: int
    height: int
    images: int
    reason: str


@dataclass(frozen=True)
class Placement:
    """The device, dtype and library versions that a loaded model runs with, and what its UNet predicts."""

    device: str
    dtype: str
    prediction_type: str  # "epsilon", "v_prediction" or "sample"
    versions: dict[str, str]


@dataclass(frozen=True)
class Execution:
    """The way in which UNet calls are computed, as SD_EXECUTION names it, and why."""

    way: str
    reason: str


@dataclass
class RunnerState:
    """The published state of one runner process. Times are Unix times. Only one thread of the runner may change it."""

    index: int | None  # BentoML's number of the process; None: nothing is published
    precision: str  # as requested
    model: str
    pid: int = field(default_factory=os.getpid)
    started_s: float = field(default_factory=time.time)
    stage: Stage = "starting"
    since_s: float = field(default_factory=time.time)
    placement: Placement | None = None  # None until the weights are loaded
    execution: Execution | None = None  # None until it is chosen
    batch_limits: list[StepBatchLimit] = field(default_factory=list)  # the native size is first, once measured

    def enter(self, stage: Stage) -> None:
        self.stage, self.since_s = stage, time.time()
        _publish(self)

    def set_batch_limit(self, batch_limit: StepBatchLimit) -> None:
        """Replace the batch limit of this size, or add it."""
        batch_limits = [
            batch_limit if (old.width, old.height) == (batch_limit.width, batch_limit.height) else old for old in self.batch_limits
        ]
        if batch_limit not in batch_limits:
            batch_limits.append(batch_limit)
        self.batch_limits = batch_limits[:1] + batch_limits[1:][-(_MAX_BATCH_LIMITS - 1) :]
        _publish(self)


def _publish(state: RunnerState) -> None:
    """Write the file. If that fails, the runner still generates."""
    if state.index is None:
        return
    try:
        file = shared_folder() / f"runner-{state.index}.json"
        unfinished = file.with_suffix(f".{state.pid}")
        unfinished.write_text(json.dumps(asdict(state)), encoding="utf-8")
        os.replace(unfinished, file)  # atomic, since others may be reading
    except OSError as error:
        _warn_once(f"/status will not show this runner, whose status file cannot be written: {error.strerror}")


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning("%s", message)


def living_runners() -> list[RunnerState]:
    """The last published states of this server's runners, by index. Runners that have died or published nothing yet are left out."""
    try:
        files = sorted(shared_folder().glob("runner-*.json"))
    except OSError:
        return []
    states: list[RunnerState] = []
    for file in files:
        try:
            state = _read(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, LookupError):
            continue  # removed in the meantime, or not a status file
        if is_alive(state.pid):
            states.append(state)
    return sorted(states, key=lambda state: state.index or 0)


def _read(text: str) -> RunnerState:
    values = json.loads(text)
    placement = None if values["placement"] is None else Placement(**values["placement"])
    execution = None if values["execution"] is None else Execution(**values["execution"])
    return RunnerState(
        **{
            **values,
            "placement": placement,
            "execution": execution,
            "batch_limits": [StepBatchLimit(**one) for one in values["batch_limits"]],
        }
    )


def is_alive(pid: int) -> bool:
    """Whether the process runs. A zombie, a dead process whose parent has not collected it yet, does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
