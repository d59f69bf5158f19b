"""Plots a report's JSON: latency against load, and step time against the number of jobs that share a step."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def plot(report: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _latency_against_load(left, report["rows"])
    _step_time_against_jobs(right, report["steps"])
    about = report["about"]
    figure.suptitle(
        f"{about['model']} at {about['side']} px, {about['gpu'] if about['gpu'] != 'none' else about['processor']}, {about['commit']}"
    )
    return figure


def _latency_against_load(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for contender in dict.fromkeys(row["contender"] for row in rows):
        closed = [row for row in rows if row["contender"] == contender and row["clients"] and not row["load"].startswith("mixed")]
        axes.plot([row["clients"] for row in closed], [row["p50_s"] for row in closed], marker="o", label=contender)
    axes.set(xlabel="clients at once", ylabel="seconds until the image (median)", title="Latency against load")
    axes.set_ylim(bottom=0)
    axes.legend()


def _step_time_against_jobs(axes: Axes, steps: list[dict[str, Any]]) -> None:
    axes.plot([step["jobs"] for step in steps], [step["step_ms"] for step in steps], marker="o", label="one step")
    axes.plot([step["jobs"] for step in steps], [step["step_ms"] / step["jobs"] for step in steps], marker="o", label="per image")
    axes.set(xlabel="images that share a step", ylabel="milliseconds", title="Step time")
    axes.set_ylim(bottom=0)
    axes.legend()


def write(results: Path) -> Path:
    """`results`: the JSON file. The plot is written next to it."""
    file = results.with_suffix(".png")
    plot(json.loads(results.read_text(encoding="utf-8"))).savefig(file, dpi=110)
    return file


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
