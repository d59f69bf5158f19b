"""Runs parts within a time budget, each in its own process, and writes all results after each part.

Does not know what a part measures: a part may write NAME.json and NAME.md to the results folder.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

# A part needs at least this time to load a model.
LEAST_S = 15.0
# From SIGTERM to SIGKILL: long enough to stop the servers that a part has started.
_GRACE_S = 8.0
_POLL_S = 0.1
_LOG_TAIL_CHARACTERS = 6000

Status = Literal["done", "failed", "ran out of time", "left out"]


@dataclass(frozen=True)
class Part:
    """A command, and the seconds after which it is stopped."""

    name: str
    command: tuple[str, ...]
    limit_s: float


@dataclass(frozen=True)
class Ended:
    """How a part ended. `seconds`: its duration."""

    name: str
    status: Status
    seconds: float
    limit_s: float
    exit_status: int | None = None


def run(
    stages: Sequence[Sequence[Part]],
    budget_s: float,
    results: Path,
    on_change: Callable[[list[Ended]], None],
    least_s: float = LEAST_S,
) -> list[Ended]:
    """Run the stages in order and the parts of one stage at the same time, until `budget_s` seconds have passed.

    After each part `on_change` gets all parts that have ended. A part that fails or runs out of time does not stop the others.
    """
    end_s = time.monotonic() + budget_s
    ended: list[Ended] = []
    others = psutil.Process().children()
    for stage in stages:
        left_s = end_s - time.monotonic()
        if left_s < least_s:
            ended += [Ended(part.name, "left out", 0.0, part.limit_s) for part in stage]
            on_change(ended)
            continue
        running: list[_Running] = []
        try:
            running += [_Running(part, min(part.limit_s, left_s), results) for part in stage]
            while running:
                for one in list(running):
                    if (outcome := one.ended()) is not None:
                        running.remove(one)
                        ended.append(outcome)
                        on_change(ended)
                time.sleep(_POLL_S)
        finally:  # Ctrl+C, or SIGTERM
            for one in running:
                stop(one.process)
            # A signal can arrive when a part has been started and is not in `running` yet.
            for child in psutil.Process().children():
                if child not in others:
                    stop(child)
    return ended


class _Running:
    """A part's process. Its output goes to NAME.log."""

    def __init__(self, part: Part, limit_s: float, results: Path) -> None:
        self._part = part
        self._limit_s = limit_s
        self._began_s = time.monotonic()
        with (results / f"{part.name}.log").open("w") as log:
            self.process = psutil.Popen(part.command, stdout=log, stderr=subprocess.STDOUT)

    def ended(self) -> Ended | None:
        """How the part ended; None while it runs. Stops it when its time is over."""
        seconds = time.monotonic() - self._began_s
        exit_status = self.process.poll()
        if exit_status is None and seconds < self._limit_s:
            return None
        if exit_status is None:
            stop(self.process)
            return Ended(self._part.name, "ran out of time", seconds, self._limit_s)
        return Ended(self._part.name, "failed" if exit_status else "done", seconds, self._limit_s, exit_status)


def stop(process: psutil.Process) -> None:
    """End a child of this process and all its descendants, including workers in sessions of their own."""
    family = [process, *process.children(recursive=True)]
    process.terminate()
    with suppress(psutil.TimeoutExpired):
        process.wait(_GRACE_S)
    for member in family:
        with suppress(psutil.NoSuchProcess):
            family += [child for child in member.children(recursive=True) if child not in family]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def summary(ended: Sequence[Ended], results: Path) -> dict[str, Any]:
    """The results of all parts, including those that were stopped."""
    parts = []
    for one in ended:
        file = results / f"{one.name}.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        parts.append({**asdict(one), "results": found})
    return {"parts": parts}


def markdown(ended: Sequence[Ended], results: Path) -> str:
    """A table of the parts, then the report of each, with the end of the log if it failed."""
    lines = ["| part | ended | seconds | of at most |", "|---|---|---|---|"]
    lines += [f"| {one.name} | {one.status} | {one.seconds:.0f} | {one.limit_s:.0f} |" for one in ended]
    sections = ["\n".join(lines)]
    for one in ended:
        sections.append(f"## {one.name}")
        page = results / f"{one.name}.md"
        if page.exists():
            sections.append(page.read_text(encoding="utf-8").strip())
        log = results / f"{one.name}.log"
        if one.status in ("failed", "ran out of time") and log.exists():
            sections.append(f"```\n{log.read_text(encoding='utf-8', errors='replace')[-_LOG_TAIL_CHARACTERS:].strip()}\n```")
    return "\n\n".join(sections) + "\n"
