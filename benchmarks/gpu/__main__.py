"""`python -m benchmarks.gpu all|PART`: the parts, the most valuable first, and their time limits."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.plan import LEAST_S, Ended, Part, markdown, run, summary
from benchmarks.gpu.table import readme_table
from stable_diffusion.models.folder import DEMO_FOLDER, DEMO_XL_FOLDER

# A call on a rented machine may take ten minutes, including the start, and all calls together fifteen.
BUDGET_S = {"first": 520.0, "second": 300.0}


def stages(results: Path, full_size: Path, side: int, steps: int, clock: float, *, on_gpu: bool) -> list[list[Part]]:
    """The proofs come before the measurements; the parts of one stage run at the same time. `clock` scales every time limit."""
    python = sys.executable

    def part(name: str, module: str, limit_s: float, *arguments: str) -> Part:
        return Part(name, (python, "-m", module, *arguments, "--name", name, "--output", str(results)), limit_s * clock)

    def loads(name: str, limit_s: float, contenders: Sequence[str], parts: Sequence[str], clients: Sequence[int], steps: int) -> Part:
        arguments = ["--model", str(full_size), "--precision", name.split("-")[-1], "--side", str(side), "--steps", str(steps)]
        arguments += ["--contenders", *contenders, "--parts", *parts, "--clients", *map(str, clients)]
        arguments += ["--requests-per-client=1", "--least-requests=4", "--requests=16", "--warm-up-requests=8", "--rounds=2"]
        arguments += ["--shares=0.8", "--short-every-s=0.3", *(["--start-at-once"] if on_gpu else [])]
        return part(name, "benchmarks.run", limit_s, *arguments)

    def step_times(name: str, precision: str, limit_s: float, *options: str) -> Part:
        arguments = ["--model", str(full_size), "--precision", precision, "--side", str(side), "--parts", "steps", *options]
        return part(name, "benchmarks.run", limit_s, *arguments)

    full = ["--model", str(full_size), "--side", str(side)]
    graphs = ["auto"] if on_gpu else []
    xl = Path(f"{full_size}-xl")
    of_xl = ["--model", str(xl), "--side", str(2 * side), "--jobs", "1", "2", "4"]
    return [
        [
            Part("full-size-model", (python, "-m", "benchmarks.full_size", str(full_size)), 80 * clock),
            part("prove-demo", "benchmarks.gpu.prove_engine", 90, "--model", str(DEMO_FOLDER), "--side", "64"),
            part("prove-http", "benchmarks.gpu.prove_http", 90, "--checks", "fp16 over HTTP", "fp32 over HTTP"),
            part("prove-demo-xl", "benchmarks.gpu.prove_engine", 90, "--model", str(DEMO_XL_FOLDER), "--side", "64", "--checks", *OF_XL),
        ],
        [
            part("prove-full-size-fp16", "benchmarks.gpu.prove_engine", 110, "--precisions", "fp16", *full),
            part("prove-full-size-fp32", "benchmarks.gpu.prove_engine", 110, "--precisions", "fp32", *full),
            part("prove-device-failure", "benchmarks.gpu.prove_http", 90, "--checks", "the device fails"),
        ],
        [part("ways-fp16", "benchmarks.gpu.ways", 60, "--precision", "fp16", *full)],
        # Half of the steps: otherwise plain diffusers alone would need two minutes for 32 clients.
        [loads("loads-fp16", 220, ["plain", "engine", *graphs, "http", "batching"], ["closed", "mixed"], [8, 1, 32, 16, 4], steps // 2)],
        # The second call of a rented machine begins here.
        [part("ways-compiled-fp16", "benchmarks.gpu.ways", 150, "--precision", "fp16", "--jobs", "1", "8", "--compile", *full)],
        [step_times("steps-fp16", "fp16", 60, "--jobs", "1", "2", "4", "8", "16", "32")],
        [step_times("loras-fp16", "fp16", 60, "--parts", "loras")],
        [step_times("steps-fp16-graphs", "fp16", 50, "--jobs", "1", "2", "4", "8", "10", "--execution", "graphs")] if on_gpu else [],
        [
            Part("full-size-xl-model", (python, "-m", "benchmarks.full_size", str(xl), "--xl"), 120 * clock),
            loads("all-steps-fp16", 90, ["plain", "engine", *graphs], ["closed"], [8, 1], steps),
        ],
        [part("ways-xl-fp16", "benchmarks.gpu.ways", 60, "--precision", "fp16", *of_xl)],
        [loads("loads-fp32", 120, ["plain", "engine", "http"], ["closed", "mixed"], [8, 1], steps // 2)],
        [step_times("steps-fp32", "fp32", 60, "--jobs", "1", "2", "4", "8", "16")],
        [loads("open-fp16", 120, ["plain", "engine", "http"], ["open", "short"], [8], steps // 2)],
    ]


# The names of the parts from which on a second call of a rented machine runs.
SECOND = "ways-compiled-fp16"
# What a model of Stable Diffusion XL is held against.
OF_XL = ("graphs as eager", "channels_last as eager", "channels_last+graphs as eager", "decoded together as alone", "in a batch as alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("parts", nargs="+", help="all, first, second (its halves), or names of parts")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="for gpu.json, gpu.md and gpu.log")
    parser.add_argument("--budget-s", type=float, help=f"seconds for everything; by default {BUDGET_S}, and for all both together")
    parser.add_argument("--clock", type=float, default=1.0, help="scales the limits of the parts, for trying the plan out")
    parser.add_argument("--model", type=Path, default=Path(tempfile.gettempdir()) / "full-size", help="made if it is not there")
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--steps", type=int, default=50, help="of a request")
    arguments = parser.parse_args()
    # Stopping this program stops the running part.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # With several processes at once, threads that spin at barriers would block the cores that others need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    results = Path(tempfile.mkdtemp(prefix="gpu-results-"))
    planned = stages(results, arguments.model, arguments.side, arguments.steps, arguments.clock, on_gpu=torch.cuda.is_available())
    known = [part.name for stage in planned for part in stage]
    if unknown := set(arguments.parts) - {"all", "first", "second", *known}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are all, first, second, {', '.join(known)}")
    halves = {"all": known, "first": known[: known.index(SECOND)], "second": known[known.index(SECOND) :]}
    # Create the model if it is missing: every part needs it.
    chosen = ["full-size-model", *(name for given in arguments.parts for name in halves.get(given, [given]))]
    planned = [[part for part in stage if part.name in chosen] for stage in planned]
    budget_s = arguments.budget_s or BUDGET_S.get(arguments.parts[0], sum(BUDGET_S.values()))
    arguments.output.mkdir(parents=True, exist_ok=True)

    def save(ended: list[Ended]) -> None:
        found = summary(ended, results)
        (arguments.output / "gpu.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        page = markdown(ended, results)
        (arguments.output / "gpu.md").write_text(f"{readme_table(found)}\n\n{page}", encoding="utf-8")
        logs = [(results / f"{one.name}.log") for one in ended]
        text = "\n".join(f"=== {log.stem}\n{log.read_text(encoding='utf-8', errors='replace')}" for log in logs if log.exists())
        (arguments.output / "gpu.log").write_text(text, encoding="utf-8")
        one = ended[-1]
        print(f"{one.name}: {one.status} after {one.seconds:.0f} s of at most {one.limit_s:.0f}", flush=True)

    ended = run([stage for stage in planned if stage], budget_s, results, save, LEAST_S * arguments.clock)
    shutil.rmtree(results)
    print((arguments.output / "gpu.md").read_text(encoding="utf-8"))
    sys.exit(0 if all(one.status == "done" for one in ended) else 1)


if __name__ == "__main__":
    main()
