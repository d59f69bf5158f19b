"""`make bench`: every contender draws every load in turn, A B A B, and one table comes out."""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from benchmarks.contenders import Round, contenders
from benchmarks.loads import Load, closed_loops
from benchmarks.report import Row, machine, markdown, row, write
from stable_diffusion.weights import DEMO_FOLDER


def bench(model: Path, side: int, loads: list[Load], rounds: int) -> list[Row]:
    table: list[Row] = []
    with contenders(model) as running, tqdm(total=len(loads) * rounds * len(running), unit="run") as progress:
        for load in loads:
            drawn: dict[str, list[Round]] = {contender.name: [] for contender in running}
            for _ in range(rounds):
                for contender in running:
                    progress.set_description(f"{load.name}: {contender.name}")
                    drawn[contender.name].append(contender.draw(load, side))
                    progress.update()
            first = drawn[running[0].name]
            table += [row(load.name, name, results, first) for name, results in drawn.items()]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO_FOLDER, help="a diffusers folder; default: the demo model")
    parser.add_argument("--side", type=int, default=64, help="pixels")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--requests-per-client", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    loads = closed_loops(arguments.steps, arguments.requests_per_client)
    table, about = bench(arguments.model, arguments.side, loads, arguments.rounds), machine()
    write(arguments.output, table, about)
    print(markdown(table, about))


if __name__ == "__main__":
    main()
