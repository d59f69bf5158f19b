"""The time budget of GPU runs, with small programs as parts that are slow, fail, hang or leave servers behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.gpu.__main__ import BUDGET_S, OF_XL, SECOND, stages
from benchmarks.gpu.checks import Checks, Finding
from benchmarks.gpu.plan import Ended, Part, markdown, run, summary
from benchmarks.gpu.prove_engine import CHECKS
from benchmarks.gpu.table import readme_table
from benchmarks.gpu.ways import Around, Timed
from benchmarks.gpu.ways import markdown as table_of_ways
from tests.http.servers import ROOT


def part(name: str, program: str, limit_s: float = 20) -> Part:
    return Part(name, (sys.executable, "-c", program), limit_s)


def run_all(stages: list[list[Part]], results: Path, budget_s: float = 60) -> tuple[list[Ended], list[int]]:
    """How the parts ended, and how many had ended at each write of the results."""
    changes: list[int] = []
    ended = run(stages, budget_s, results, lambda so_far: changes.append(len(so_far)), least_s=1.0)
    return ended, changes


def test_parts_run_in_order_and_results_are_written_after_each(tmp_path: Path) -> None:
    note = "open({!r}, 'a').write({!r})"
    file = str(tmp_path / "order")
    ended, changes = run_all([[part("first", note.format(file, "1"))], [part("second", note.format(file, "2"))]], tmp_path)
    assert [(one.name, one.status) for one in ended] == [("first", "done"), ("second", "done")]
    assert changes == [1, 2]
    assert Path(file).read_text() == "12"


def test_parts_of_one_stage_run_at_the_same_time(tmp_path: Path) -> None:
    wait_for_other = "import pathlib, time\npathlib.Path({!r}).touch()\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.01)"
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    ended, _ = run_all([[part("a", wait_for_other.format(one, other)), part("b", wait_for_other.format(other, one))]], tmp_path)
    assert {item.status for item in ended} == {"done"}


def test_a_failed_part_is_reported_with_its_output_and_the_next_one_runs(tmp_path: Path) -> None:
    ended, _ = run_all([[part("fails", "raise SystemExit('no such device')")], [part("next", "pass")]], tmp_path)
    assert [(one.status, one.exit_status) for one in ended] == [("failed", 1), ("done", 0)]
    assert "no such device" in markdown(ended, tmp_path)


def test_a_hanging_part_is_stopped_and_its_findings_are_kept(tmp_path: Path) -> None:
    results = json.dumps({"found": 1})
    hangs = f"import pathlib, time\npathlib.Path({str(tmp_path / 'hangs.json')!r}).write_text({results!r})\ntime.sleep(600)"
    ended, _ = run_all([[part("hangs", hangs, limit_s=2)], [part("next", "pass")]], tmp_path)
    assert [one.status for one in ended] == ["ran out of time", "done"]
    assert 2 <= ended[0].seconds < 4
    assert summary(ended, tmp_path)["parts"][0]["results"] == {"found": 1}


def test_a_part_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.plan._GRACE_S", 0.5)
    stubborn = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)"
    ended, _ = run_all([[part("stubborn", stubborn, limit_s=1)]], tmp_path)
    assert ended[0].status == "ran out of time"


def test_all_processes_of_a_part_end_with_it_even_in_another_session(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    starts = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(child.pid))\ntime.sleep(600)"
    )
    run_all([[part("starts", starts, limit_s=3)]], tmp_path)
    pid = int(pid_file.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_parts_without_enough_time_are_reported(tmp_path: Path) -> None:
    slow = part("slow", "import time; time.sleep(600)")
    ended, changes = run_all([[slow], [part("late", "pass"), part("later", "pass")]], tmp_path, budget_s=2)
    assert [(one.name, one.status) for one in ended] == [("slow", "ran out of time"), ("late", "left out"), ("later", "left out")]
    assert changes[-1] == 3
    assert "| later | left out |" in markdown(ended, tmp_path)


def test_a_stopped_plan_leaves_no_part_running(tmp_path: Path) -> None:
    """Stop the plan from outside, like the time limit of a rented machine."""
    program = (
        "import signal, sys\nfrom pathlib import Path\nfrom benchmarks.gpu.plan import Part, run\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))\n"
        f"part = Part('p', (sys.executable, '-c', 'import time; time.sleep(600)'), 60)\nrun([[part]], 60, Path({str(tmp_path)!r}), print)"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) as plan:
        deadline_s = time.monotonic() + 20
        while not (children := psutil.Process(plan.pid).children()):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        plan.send_signal(signal.SIGTERM)
        plan.wait(20)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def test_a_check_that_raises_fails_and_the_next_one_runs(tmp_path: Path) -> None:
    def raises() -> Finding:
        raise RuntimeError("out of luck\nand more")

    checks = Checks(tmp_path, "proof", {"gpu": "none"})
    checks.make("first", raises)
    checks.make("second", lambda: Finding(True, "equal"))
    checks.make("third", lambda: Finding(None, "needs a GPU"))
    found = json.loads((tmp_path / "proof.json").read_text())["checks"]
    assert [(one["name"], one["passed"]) for one in found] == [("first", False), ("second", True), ("third", None)]
    page = (tmp_path / "proof.md").read_text()
    assert "| first | NO | RuntimeError: out of luck |" in page
    assert "| third | not here | needs a GPU |" in page


def test_readmes_table_has_a_row_for_each_load_and_a_column_for_each_contender() -> None:
    def row(contender: str, images_per_s: float, rounds: int = 1) -> dict[str, object]:
        of_row = {"load": "50 steps, 8 clients", "contender": contender, "images_per_s": images_per_s}
        return {**of_row, "rounds": rounds, "spread": 0.1, "p50_s": 1.5}

    rows = [row("plain diffusers", 1.0), row("engine", 3.0, rounds=2)]
    found = {"parts": [{"results": {"about": {"precision": "fp16"}, "rows": rows}}, {"results": None}]}
    lines = readme_table(found).splitlines()
    assert len(lines) == 3
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| fp16, 50 steps, 8 clients | 1.00/s; 1.50 s |  | 3.00/s, ± 5 %; 1.50 s |  |  |"
    assert readme_table({"parts": []}) == "No load was measured."


def test_proofs_come_before_tables_and_both_halves_fit_into_the_minutes_of_a_rented_machine(tmp_path: Path) -> None:
    planned = stages(tmp_path, tmp_path / "full", 512, 50, 1.0, on_gpu=True)
    names = [part.name for stage in planned for part in stage]
    assert len(set(names)) == len(names)
    proofs = [index for index, name in enumerate(names) if name.startswith("prove-")]
    tables = [index for index, name in enumerate(names) if name.startswith(("loads-", "steps-", "ways-", "loras-", "open-"))]
    assert max(proofs) < min(tables) < names.index(SECOND)
    assert {"ways-fp16", "ways-compiled-fp16", "ways-xl-fp16", "loras-fp16", "prove-demo-xl"} <= set(names)
    assert set(OF_XL) <= set(CHECKS)
    assert {"graphs as eager", "channels_last as eager", "channels_last+graphs as eager"} <= set(CHECKS)
    # The parts of a stage run at once. What does not fit at the end of a half is left out.
    limits = {part.name: max(other.limit_s for other in stage) for stage in planned for part in stage}
    assert sum({max(part.limit_s for part in stage) for stage in planned[:4]}) <= BUDGET_S["first"]
    assert limits[SECOND] < BUDGET_S["second"]
    assert sum(BUDGET_S.values()) < 15 * 60


def test_a_way_that_fell_back_to_eager_shows_in_its_row() -> None:
    timed = [Timed("eager", "LoRA", 1, 20.0, 0.0, "eager"), Timed("graphs", "LoRA", 1, 20.1, 0.0, "eager")]
    page = table_of_ways({"gpu": "none"}, timed, [Around("decoded by the VAE", 4, 60.0)], {"compile+graphs": "RuntimeError: no compiler"})
    assert "| graphs | LoRA | 20.1 | 0.0e+00 | eager |" in page
    assert "| decoded by the VAE | 4 | 60.0 |" in page
    assert "compile+graphs: RuntimeError: no compiler" in page
