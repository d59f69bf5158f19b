"""`make bench`: every contender runs every load in turn, A B A B. Writes tables and JSON."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from benchmarks import loads, servers
from benchmarks.clients import Round
from benchmarks.contenders import Contender, InProcess, engine, plain_diffusers
from benchmarks.loads import Load
from benchmarks.lora_steps import time_lora_steps
from benchmarks.report import Report, Row, Start, machine, markdown, row, write
from benchmarks.setup import Setup
from benchmarks.steps import time_steps
from stable_diffusion.models.folder import DEMO_FOLDER

# Plain diffusers is first, because the others are compared with the first.
CONTENDERS: dict[str, Callable[[Setup], Contender]] = {
    "plain": lambda setup: InProcess("plain diffusers", plain_diffusers, setup),
    "engine": lambda setup: InProcess("engine", engine, replace(setup, execution="eager")),
    "graphs": lambda setup: InProcess("engine, CUDA graphs", engine, replace(setup, execution="graphs")),
    "auto": lambda setup: InProcess("engine, auto", engine, replace(setup, execution="auto")),
    "http": servers.this_project,
    "batching": servers.request_batching,
}
PARTS = ("steps", "loras", "closed", "mixed", "open", "short")
JOBS = (1, 2, 4, 8, 16)


@contextmanager
def started(names: Sequence[str], setup: Setup, *, at_once: bool = False) -> Iterator[list[Contender]]:
    """`at_once`: for a machine with a core for each contender. The engine starts first, and the others reuse its measured batch limit,
    because step times mean little while others load."""
    with ExitStack() as ends:

        def start(name: str) -> Contender:
            contender = CONTENDERS[name](setup)
            ends.callback(contender.end)  # even if another one fails to start
            return contender

        if not at_once:
            yield [start(name) for name in names]
            return
        setup = replace(setup, cache=Path(ends.enter_context(tempfile.TemporaryDirectory())))
        first = {name: start(name) for name in names if name == "engine"}
        others = [name for name in names if name not in first]
        with ThreadPoolExecutor(max(1, len(others))) as threads:
            running = first | dict(zip(others, threads.map(start, others), strict=True))
        yield [running[name] for name in names]


def bench(running: Sequence[Contender], wanted: Sequence[Load], rounds: int, report: Report, save: Callable[[], None]) -> None:
    """Add a row for each load and contender, saved after each run. All loads run once before any runs again: if time runs out, there
    are fewer rounds, not fewer rows."""
    drawn: dict[str, dict[str, list[Round]]] = {load.name: {contender.name: [] for contender in running} for load in wanted}
    starts: dict[str, Start] = {}
    with tqdm(total=len(wanted) * rounds * len(running), unit="run") as progress:
        for _ in range(rounds):
            for load in wanted:
                for contender in running:
                    progress.set_description(f"{load.name}: {contender.name}")
                    last = contender.generate(load)
                    drawn[load.name][contender.name].append(last)
                    starts[contender.name] = Start(contender.name, contender.started_in_s, last.peak_memory_mib, last.device_memory_mib)
                    report.rows = _rows(wanted, drawn, running[0].name)
                    report.starts = list(starts.values())
                    save()
                    progress.update()


def _rows(wanted: Sequence[Load], drawn: dict[str, dict[str, list[Round]]], first: str) -> list[Row]:
    return [row(load, name, results, drawn[load.name][first]) for load in wanted for name, results in drawn[load.name].items() if results]


def open_loops(running: Sequence[Contender], side: int, steps: int, requests: int, shares: Sequence[float]) -> list[Load]:
    """Loads at shares of the first contender's capacity for the same tasks."""
    closed = running[0].generate(loads.mixed(side, steps, 1, requests))
    per_s = closed.images / closed.seconds
    return [loads.mixed_arrivals(side, steps, requests, share * per_s, share) for share in shares]


def main() -> None:
    arguments = _arguments()
    # As after Ctrl+C, so that no server is left running.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    setup = Setup(arguments.model.resolve(), arguments.precision, arguments.side, execution=arguments.execution)
    about = {**machine(), "model": setup.model.parent.name if setup.model == DEMO_FOLDER else setup.model.name, "side": str(setup.side)}
    report = Report({**about, "precision": setup.precision})
    side, steps = setup.side, arguments.steps
    save = partial(write, arguments.output, arguments.name, report)
    if "steps" in arguments.parts:
        for step_time in time_steps(setup, arguments.jobs):
            report.steps.append(step_time)
            save()
    if "loras" in arguments.parts:
        report.lora_steps.extend(time_lora_steps(setup))
        save()
    wanted = [part for part in arguments.parts if part not in ("steps", "loras")]
    if wanted:
        with started(arguments.contenders, setup, at_once=arguments.start_at_once) as running:
            for contender in running:
                contender.generate(loads.warm_up(side, arguments.warm_up_requests))
            wanted_loads = [load for part in wanted for load in _loads(part, running, side, steps, arguments)]
            bench(running, wanted_loads, arguments.rounds, report, save)
    save()
    print(markdown(report))
    written = arguments.output / arguments.name
    print(f"Written to {written}.md and .json; the plot: python -m benchmarks.plot {written}.json")


def _loads(part: str, running: Sequence[Contender], side: int, steps: int, arguments: argparse.Namespace) -> list[Load]:
    match part:
        case "closed":
            return [
                loads.same_steps(side, steps, clients, max(arguments.requests_per_client, -(-arguments.least_requests // clients)))
                for clients in arguments.clients
            ]
        case "mixed":
            return [loads.mixed(side, steps, 8, arguments.requests)]
        case "open":
            return open_loops(running, side, steps, arguments.requests, arguments.shares)
        case _:
            return [loads.short_among_long(side, steps, 12, 4, arguments.short_every_s)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_FOLDER, help="a diffusers folder")
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32")
    parser.add_argument("--side", type=int, default=64, help="pixels")
    parser.add_argument("--steps", type=int, default=50, help="steps of a request; the maximum in mixed loads")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    default = ["plain", "engine", "http", "batching"]
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=default, help="the others are compared with the first")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 8, 16], help="of the closed loops")
    parser.add_argument("--execution", default="eager", help="how timed steps are computed, as in SD_EXECUTION; contenders have their own")
    parser.add_argument("--jobs", nargs="+", type=int, default=list(JOBS), help="numbers of jobs whose shared steps are timed")
    parser.add_argument("--requests-per-client", type=int, default=2, help="in the closed loops")
    parser.add_argument("--least-requests", type=int, default=1, help="minimum for a closed loop with few clients")
    parser.add_argument("--start-at-once", action="store_true", help="start all contenders at once, on a machine with cores for all")
    parser.add_argument("--requests", type=int, default=24, help="requests in the mixed loads")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.8, 1.5], help="of plain diffusers' capacity, for the open loops")
    parser.add_argument("--short-every-s", type=float, default=1.0)
    parser.add_argument("--warm-up-requests", type=int, default=32, help="for every contender, not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="table", help="name of the output files")
    return parser.parse_args()


if __name__ == "__main__":
    main()
