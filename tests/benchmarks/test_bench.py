"""The benchmark itself: its arithmetic on made-up rounds, and a run of a few seconds with both contenders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.contenders import Round
from benchmarks.loads import Load, closed_loops
from benchmarks.report import markdown, row, write
from benchmarks.run import bench
from stable_diffusion.weights import DEMO_FOLDER


def made_up(seconds: float, latencies_s: list[float]) -> Round:
    return Round(seconds, latencies_s, 500.0, None)


def test_rates_are_medians_and_ratios_compare_round_with_round() -> None:
    # The machine was half as fast during the second round, for both.
    plain = [made_up(10, [1.0] * 10), made_up(20, [2.0] * 10), made_up(10, [1.0] * 10)]
    ours = [made_up(5, [0.5] * 10), made_up(10, [1.0] * 10), made_up(4, [0.4] * 10)]
    line = row("load", "ours", ours, plain)
    assert line.images_per_s == 2.0
    assert line.times_the_first == 2.0
    assert line.spread == pytest.approx((2.5 - 1.0) / 2.0)


def test_percentiles_are_latencies_that_occurred() -> None:
    line = row("load", "ours", [made_up(1, [float(number) for number in range(1, 101)])], [made_up(1, [1.0])])
    assert (line.p50_s, line.p95_s, line.p99_s) == (50.0, 95.0, 99.0)
    assert line.mean_s == 50.5


def test_a_load_asks_for_as_many_pictures_as_it_says_with_seeds_of_their_own() -> None:
    for load in closed_loops(50, 2):
        tasks = load.tasks(64)
        assert len(tasks) == load.requests == 2 * load.clients
        assert len({task.seed for task in tasks}) == load.requests
    mixed = closed_loops(50, 2)[-1].tasks(64)
    assert {task.num_inference_steps for task in mixed} == {4, 50, 12, 30, 20}
    assert {task.guidance_scale for task in mixed} == {1.0, 7.5}


def test_both_contenders_draw_a_small_load_and_a_table_comes_out(tmp_path: Path) -> None:
    table = bench(DEMO_FOLDER, 64, [Load("small", 3, 6, (2,))], rounds=1)
    assert [line.contender for line in table] == ["plain diffusers", "engine"]
    plain, engine = table
    assert plain.times_the_first == 1.0
    assert plain.rows_per_call is None
    assert engine.rows_per_call is not None
    assert engine.rows_per_call > 2, "three clients with guidance share steps"
    assert all(0 < line.p50_s <= line.p99_s < 60 for line in table)
    write(tmp_path, table, {"commit": "abc"})
    assert len(json.loads((tmp_path / "table.json").read_text())["rows"]) == 2
    written = (tmp_path / "table.md").read_text()
    assert written == markdown(table, {"commit": "abc"})
    assert len({line.count("|") for line in written.splitlines()[2:]}) == 1
