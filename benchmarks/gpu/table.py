"""Makes README's table from the parts' results: images per second and the median wait, by load and contender."""

from __future__ import annotations

from typing import Any

_HEADS = {
    "plain diffusers": "plain diffusers, one by one",
    "BentoML's batching, HTTP": "BentoML's own batching",
    "engine": "engine",
    "engine, auto": "engine, fastest way",
    "this project, HTTP": "this project, HTTP",
}


def readme_table(summary: dict[str, Any]) -> str:
    """Markdown, or a note if no load was measured."""
    lines = [f"| load | {' | '.join(_HEADS.values())} |", "|---" * (len(_HEADS) + 1) + "|"]
    for part in summary["parts"]:
        results = part["results"] or {}
        for load in dict.fromkeys(row["load"] for row in results.get("rows", ())):
            of_load = {row["contender"]: row for row in results["rows"] if row["load"] == load}
            cells = [_cell(of_load.get(contender)) for contender in _HEADS]
            lines.append(f"| {results['about']['precision']}, {load} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else "No load was measured."


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    spread = f", ± {50 * row['spread']:.0f} %" if row["rounds"] > 1 else ""
    wait = "" if row["p50_s"] is None else f"; {row['p50_s']:.2f} s"
    return f"{row['images_per_s']:.2f}/s{spread}{wait}"
