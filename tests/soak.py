"""`make soak`: half an hour of mixed load, clients that leave and faults on a real server, with a ledger of requests against answers.

Memory and descriptors of every process are measured all the while; fails if one of them grows, or if the ledger is uneven.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from tqdm import tqdm

from tests.http.ledger import Load
from tests.http.servers import ROOT, Server, serve

CLIENTS = 8
SAMPLE_EVERY_S = 10
# The first minutes fill what is kept on purpose: allocators' pools, prompt embeddings, the jobs that are remembered.
LEFT_OUT = 1 / 3
MOST_GROWTH_MIB_PER_HOUR = 40.0
MOST_MORE_DESCRIPTORS = 10


@dataclass(frozen=True)
class Sample:
    seconds: float
    resident_mib: float
    descriptors: int


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    minutes: float = parser.parse_args(arguments).minutes
    variables = {"PYTHONPATH": str(ROOT), "BENTOML_CONFIG": str(ROOT / "fp32" / "configuration.yaml")}
    with (
        tempfile.TemporaryDirectory() as home,
        serve(ROOT / "tests" / "http" / "faulty", "service:svc", Path(home), variables) as server,
    ):
        load = Load(server.url, seed=7)
        load.draw_alone()
        load.draw_every_size()
        samples = asyncio.run(_soak(server, load, minutes * 60))
        print(load.summary())
        seconds = sorted(entry.seconds for entry in load.entries)
        print(f"median {seconds[len(seconds) // 2]:.2f} s, 99 % {seconds[len(seconds) * 99 // 100]:.2f} s, longest {seconds[-1]:.2f} s")
    growing = [process for process, measured in samples.items() if not _is_flat(process, measured)]
    if growing:
        raise SystemExit(f"these grow: {', '.join(growing)}")
    print("the ledger is even, no process grows")


async def _soak(server: Server, load: Load, seconds: float) -> dict[str, list[Sample]]:
    began = time.monotonic()
    running = asyncio.ensure_future(load.run(CLIENTS, lambda: time.monotonic() < began + seconds))
    samples: dict[str, list[Sample]] = defaultdict(list)
    with tqdm(total=round(seconds), unit="s", disable=None) as bar:
        while not running.done():
            _measure(server, time.monotonic() - began, samples)
            await asyncio.wait({running}, timeout=SAMPLE_EVERY_S)
            bar.n = min(round(time.monotonic() - began), round(seconds))
            bar.refresh()
    await running
    return samples


def _measure(server: Server, seconds: float, samples: dict[str, list[Sample]]) -> None:
    first = psutil.Process(server.process.pid)
    for process in (first, *first.children(recursive=True)):
        with process.oneshot():
            sample = Sample(seconds, process.memory_info().rss / 2**20, process.num_fds())
            samples[_name(process)].append(sample)


def _name(process: psutil.Process) -> str:
    command = " ".join(process.cmdline())
    kind = next((name for name in ("worker.runner", "worker.http_api_server") if name in command), "first process")
    return f"{kind.removeprefix('worker.')} {process.pid}"


def _is_flat(process: str, samples: list[Sample]) -> bool:
    later = samples[round(len(samples) * LEFT_OUT) :]
    slope_s, _ = np.polyfit([one.seconds for one in later], [one.resident_mib for one in later], 1)
    per_hour = float(slope_s) * 3600
    more = later[-1].descriptors - later[0].descriptors
    print(
        f"{process}: {later[0].resident_mib:.1f} to {later[-1].resident_mib:.1f} MiB, slope {per_hour:+.1f} MiB an hour, "
        f"{later[0].descriptors} to {later[-1].descriptors} descriptors ({len(later)} samples)"
    )
    return per_hour < MOST_GROWTH_MIB_PER_HOUR and more < MOST_MORE_DESCRIPTORS


if __name__ == "__main__":
    main(sys.argv[1:])
