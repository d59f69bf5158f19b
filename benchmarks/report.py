"""Makes tables from rounds: medians over the rounds and their spread, as Markdown for people and as JSON."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.clients import Round
from benchmarks.loads import Load
from benchmarks.lora_steps import LoraStepTime
from benchmarks.steps import StepTime


@dataclass(frozen=True)
class Row:
    load: str
    clients: int  # 0: requests arrive at fixed times
    contender: str
    rounds: int
    images_per_s: float
    spread: float  # of images_per_s: (largest - smallest) / median
    times_the_first: float  # ratio of images_per_s to the first contender's for the same load
    latencies: int  # the number of measured latencies
    mean_s: float | None
    p50_s: float | None
    p95_s: float | None  # None below 20 latencies
    p99_s: float | None  # None below 100 latencies
    errors: int
    rows_per_call: float | None


@dataclass(frozen=True)
class Start:
    """A contender's start time and memory. `peak_memory_mib`: of each of its processes, the largest first.

    `device_memory_mib`: its GPU memory after the start; None without a GPU, or if the driver does not report it.
    """

    contender: str
    started_in_s: float
    peak_memory_mib: tuple[float, ...]
    device_memory_mib: float | None = None


@dataclass
class Report:
    about: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    steps: list[StepTime] = field(default_factory=list)
    lora_steps: list[LoraStepTime] = field(default_factory=list)


def row(load: Load, contender: str, rounds: Sequence[Round], first: Sequence[Round]) -> Row:
    rates = [_rate(one) for one in rounds]
    latencies = sorted(latency for one in rounds for latency in one.latencies_s)
    rows_per_call = [one.rows_per_call for one in rounds if one.rows_per_call is not None]
    return Row(
        load=load.name,
        clients=load.clients,
        contender=contender,
        rounds=len(rounds),
        images_per_s=statistics.median(rates),
        spread=(max(rates) - min(rates)) / max(statistics.median(rates), 1e-9),
        # Compare round with round, so that a temporary slowdown of the machine affects both. In the last round the first may be ahead.
        times_the_first=statistics.median(_rate(one) / _rate(other) for one, other in zip(rounds, first, strict=False)),
        latencies=len(latencies),
        mean_s=statistics.mean(latencies) if latencies else None,
        p50_s=_percentile(latencies, 50),
        p95_s=_percentile(latencies, 95),
        p99_s=_percentile(latencies, 99),
        errors=sum(one.errors for one in rounds),
        rows_per_call=statistics.mean(rows_per_call) if rows_per_call else None,
    )


def _rate(one: Round) -> float:
    return one.images / one.seconds


def _percentile(ordered: Sequence[float], percent: int) -> float | None:
    """Nearest rank; None if it would be the largest value."""
    if len(ordered) * (100 - percent) < 100 and percent > 50 or not ordered:
        return None
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def machine() -> dict[str, str]:
    import torch

    from stable_diffusion.engine.loading import device_name

    # A copy of the files on another machine has no git history.
    commit = os.environ.get("BENCH_COMMIT") or _commit()
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit,
        "processor": device_name(torch.device("cpu")),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
    }


def _commit() -> str:
    return subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False).stdout.strip()


def markdown(report: Report) -> str:
    parts = [", ".join(f"{name}: {value}" for name, value in report.about.items())]
    if report.rows:
        heads = ["load", "contender", "images/s", "spread", "times plain", "of", "mean s", "p50 s", "p95 s", "p99 s", "errors", "rows/call"]
        parts.append(_table(heads, [_cells(one) for one in report.rows]))
    if report.starts:
        starts = [
            [
                one.contender,
                f"{one.started_in_s:.1f}",
                ", ".join(f"{peak:.0f}" for peak in one.peak_memory_mib),
                "" if one.device_memory_mib is None else f"{one.device_memory_mib:.0f}",
            ]
            for one in report.starts
        ]
        parts.append(_table(["contender", "can generate after s", "peak MiB of its processes", "MiB of the GPU"], starts))
    if report.steps:
        heads = ["jobs in a step", "step ms", "UNet call ms", "between calls", "TFLOP a call", "TFLOPS", "of the matrix product"]
        parts.append(_table(heads, [_step_cells(one) for one in report.steps]))
    if report.lora_steps:
        rows = [[one.mix, f"{one.step_ms:.1f}", f"{one.times_none:.2f}"] for one in report.lora_steps]
        parts.append(_table(["LoRAs of 8 jobs", "step ms", "times none"], rows))
    return "\n\n".join(parts) + "\n"


def _cells(one: Row) -> list[str]:
    return [
        one.load,
        one.contender,
        f"{one.images_per_s:.2f}",
        f"{100 * one.spread:.0f} %",
        f"{one.times_the_first:.2f}",
        str(one.latencies),
        *("" if figure is None else f"{figure:.2f}" for figure in (one.mean_s, one.p50_s, one.p95_s, one.p99_s)),
        str(one.errors),
        f"{one.rows_per_call:.1f}" if one.rows_per_call is not None else "",
    ]


def _step_cells(one: StepTime) -> list[str]:
    return [
        str(one.jobs),
        f"{one.step_ms:.1f}",
        f"{one.unet_ms:.1f}",
        f"{100 * one.between_calls:.1f} %",
        f"{one.tflop:.3f}",
        f"{1000 * one.tflop / one.unet_ms:.3f}",
        f"{100 * one.share_of_matrix_product:.0f} % of {one.matrix_product_tflops:.3f}",
    ]


def _table(heads: list[str], rows: Sequence[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows])


def write(folder: Path, name: str, report: Report) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(markdown(report), encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")
