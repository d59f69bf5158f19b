"""Runs checks and writes their findings after each one. Does not know what they check."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """The result of a check. `passed` is None if the check cannot run on this machine."""

    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool | None
    detail: str
    seconds: float


class Checks:
    """Runs checks one after the other. A check that raises has failed, and the next one runs."""

    def __init__(self, results: Path, name: str, about: dict[str, str]) -> None:
        self._file = results / name
        self._about = about
        self.made: list[Check] = []

    def make(self, name: str, check: Callable[[], Finding]) -> None:
        began_s = time.perf_counter()
        try:
            finding = check()
        except Exception as error:
            traceback.print_exc()  # to the part's log
            finding = Finding(False, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}")
        self.made.append(Check(name, finding.passed, finding.detail, time.perf_counter() - began_s))
        self._write()

    def _write(self) -> None:
        content = {"about": self._about, "checks": [asdict(one) for one in self.made]}
        self._file.with_name(self._file.name + ".json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        self._file.with_name(self._file.name + ".md").write_text(self._markdown(), encoding="utf-8")

    def _markdown(self) -> str:
        words = {True: "yes", False: "NO", None: "not here"}
        lines = [", ".join(f"{name}: {value}" for name, value in self._about.items()), ""]
        lines += ["| check | passed | finding | s |", "|---|---|---|---|"]
        lines += [f"| {one.name} | {words[one.passed]} | {one.detail} | {one.seconds:.1f} |" for one in self.made]
        return "\n".join(lines) + "\n"
