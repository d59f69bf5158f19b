"""Two processes that compute at once, like two servers on one machine, do not block each other."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

import pytest

from tests.http.servers import ROOT

SECONDS = 12.0
TIMES_ALONE = 3.0  # ideal on two cores: 2


def compute(processes: int, jobs: int = 2) -> list[list[float]]:
    """The step times of each process, in ms; all processes start together."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "MKL_"))}
    command = [sys.executable, "-W", "ignore", "-m", "tests.slow.computing", str(jobs), str(SECONDS)]
    started = [
        subprocess.Popen(command, cwd=ROOT, env=kept, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(processes)
    ]
    found = []
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in started:
        output, _ = process.communicate(timeout=SECONDS + 120)
        found.append(json.loads(output))
    return found


@pytest.mark.alone
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_processes_at_once_take_at_most_three_times_as_long_as_one() -> None:
    (alone,) = compute(1)
    beside = compute(2)
    usual_ms = statistics.median(alone)
    for times_ms in beside:
        # Over the whole time, including the steps before the engine reacts.
        assert SECONDS * 1000 / len(times_ms) <= TIMES_ALONE * usual_ms, (
            f"{usual_ms:.0f} ms alone, {statistics.median(times_ms):.0f} beside"
        )
