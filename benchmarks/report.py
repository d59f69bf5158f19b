"""Rounds to a table: medians over the rounds and their spread, as Markdown for people and as JSON."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.contenders import Round


@dataclass(frozen=True)
class Row:
    load: str
    contender: str
    rounds: int
    images_per_s: float
    spread: float  # of images_per_s: (largest - smallest) / median
    times_the_first: float  # images_per_s against the first contender's of the same load
    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    rows_per_call: float | None
    peak_memory_mib: float


def row(load: str, contender: str, rounds: Sequence[Round], first: Sequence[Round]) -> Row:
    rates = [_rate(one) for one in rounds]
    latencies = sorted(latency for one in rounds for latency in one.latencies_s)
    rows_per_call = [one.rows_per_call for one in rounds if one.rows_per_call is not None]
    return Row(
        load=load,
        contender=contender,
        rounds=len(rounds),
        images_per_s=statistics.median(rates),
        spread=(max(rates) - min(rates)) / statistics.median(rates),
        # Round against round, so that what slows the machine down for a while slows both.
        times_the_first=statistics.median(_rate(one) / _rate(other) for one, other in zip(rounds, first, strict=True)),
        mean_s=statistics.mean(latencies),
        p50_s=_percentile(latencies, 50),
        p95_s=_percentile(latencies, 95),
        p99_s=_percentile(latencies, 99),
        rows_per_call=statistics.mean(rows_per_call) if rows_per_call else None,
        peak_memory_mib=max(one.peak_memory_mib for one in rounds),
    )


def _rate(one: Round) -> float:
    return len(one.latencies_s) / one.seconds


def _percentile(ordered: Sequence[float], percent: int) -> float:
    """Nearest rank."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def machine() -> dict[str, str]:
    import torch

    from stable_diffusion.pipelines import device_name

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit,
        "processor": device_name(torch.device("cpu")),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
    }


def markdown(rows: Sequence[Row], about: dict[str, str]) -> str:
    lines = [", ".join(f"{name}: {value}" for name, value in about.items()), ""]
    lines += ["| load | contender | images/s | spread | times plain | mean s | p50 s | p95 s | p99 s | rows/call | peak MiB |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|---|"]
    for one in rows:
        figures = [one.images_per_s, one.times_the_first, one.mean_s, one.p50_s, one.p95_s, one.p99_s]
        rows_per_call = f"{one.rows_per_call:.1f}" if one.rows_per_call is not None else ""
        cells = [one.load, one.contender, *(f"{figure:.2f}" for figure in figures), rows_per_call, f"{one.peak_memory_mib:.0f}"]
        cells.insert(3, f"{100 * one.spread:.0f} %")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(folder: Path, rows: Sequence[Row], about: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(markdown(rows, about), encoding="utf-8")
    (folder / "table.json").write_text(json.dumps({"machine": about, "rows": [asdict(one) for one in rows]}, indent=1), encoding="utf-8")
