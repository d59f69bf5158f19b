"""How far a runner is and what it computes on, as a small file in the server's shared folder: runners write, API workers read.

Knows nothing of HTTP or metrics, loads no torch. There is no prompt and no path in it.
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
STAGES: tuple[Stage, ...] = get_args(Stage)  # in their order

_MOST_BATCH_LIMITS = 16  # the native size and the last ones that ran out of memory


@dataclass(frozen=True)
class StepBatchLimit:
    """How many pictures of this size may share a step, and why. Sizes in pixels."""

    width: int
    height: int
    pictures: int
    reason: str


@dataclass(frozen=True)
class Placement:
    """What a loaded model is computed on, in what, and with which versions."""

    device: str
    dtype: str
    versions: dict[str, str]


@dataclass
class RunnerState:
    """What one runner process tells of itself; times are Unix times. Only one thread of the runner may change it."""

    index: int | None  # BentoML's number of the process; None: it tells nobody
    precision: str  # the one that was asked for
    model: str
    pid: int = field(default_factory=os.getpid)
    started_s: float = field(default_factory=time.time)
    stage: Stage = "starting"
    since_s: float = field(default_factory=time.time)
    placement: Placement | None = None  # None until the weights are loaded
    batch_limits: list[StepBatchLimit] = field(default_factory=list)  # the native size comes first, once it is measured

    def enter(self, stage: Stage) -> None:
        self.stage, self.since_s = stage, time.time()
        _publish(self)

    def set_batch_limit(self, batch_limit: StepBatchLimit) -> None:
        """Takes the place of what was said of this size before."""
        batch_limits = [
            batch_limit if (old.width, old.height) == (batch_limit.width, batch_limit.height) else old for old in self.batch_limits
        ]
        if batch_limit not in batch_limits:
            batch_limits.append(batch_limit)
        self.batch_limits = batch_limits[:1] + batch_limits[1:][-(_MOST_BATCH_LIMITS - 1) :]
        _publish(self)


def _publish(state: RunnerState) -> None:
    """A folder that cannot be written to is no reason not to draw."""
    if state.index is None:
        return
    try:
        file = shared_folder() / f"runner-{state.index}.json"
        unfinished = file.with_suffix(f".{state.pid}")
        unfinished.write_text(json.dumps(asdict(state)), encoding="utf-8")
        os.replace(unfinished, file)  # others may be reading
    except OSError as error:
        _say_once(f"/status will know nothing of this runner: {error.strerror}")


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.warning("%s", message)


def living_runners() -> list[RunnerState]:
    """What the runners of this server have told last, by index. One that has died or has not told anything yet is left out."""
    try:
        files = sorted(shared_folder().glob("runner-*.json"))
    except OSError:
        return []
    states: list[RunnerState] = []
    for file in files:
        try:
            state = _read(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, LookupError):
            continue  # gone again, or not ours
        if is_alive(state.pid):
            states.append(state)
    return sorted(states, key=lambda state: state.index or 0)


def _read(text: str) -> RunnerState:
    values = json.loads(text)
    placement = None if values["placement"] is None else Placement(**values["placement"])
    return RunnerState(**{**values, "placement": placement, "batch_limits": [StepBatchLimit(**one) for one in values["batch_limits"]]})


def is_alive(pid: int) -> bool:
    """A process that has ended is not, though its parent may not have noticed yet."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
