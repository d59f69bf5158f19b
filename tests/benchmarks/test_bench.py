"""The benchmark itself: its arithmetic on made-up rounds, its clients, and a run of a few seconds with all contenders."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import loads, plot
from benchmarks.clients import Round, play
from benchmarks.contenders import InProcess
from benchmarks.loads import Load
from benchmarks.plain import Plain
from benchmarks.report import Report, Row, Start, markdown, row, write
from benchmarks.run import CONTENDERS, bench, started
from benchmarks.setup import Setup
from benchmarks.steps import StepTime, count_tflop, time_step
from stable_diffusion.core.types import Task
from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.job import Job
from stable_diffusion.engine.loading import Parts
from stable_diffusion.models.folder import DEMO_FOLDER
from tests.benchmarks.dying import die
from tests.model.recording_engine import RecordingEngine

LOAD = loads.same_steps(64, 2, clients=2, requests_per_client=5)
DEMO = Setup(DEMO_FOLDER, "fp32", 64)


def made_up(seconds: float, latencies_s: list[float], errors: int = 0) -> Round:
    return Round(seconds, len(latencies_s), latencies_s, errors)


def test_rates_are_medians_and_ratios_compare_round_with_round() -> None:
    # During the second round the machine was half as fast, for both contenders.
    plain = [made_up(10, [1.0] * 10), made_up(20, [2.0] * 10), made_up(10, [1.0] * 10)]
    ours = [made_up(5, [0.5] * 10), made_up(10, [1.0] * 10), made_up(4, [0.4] * 10)]
    line = row(LOAD, "ours", ours, plain)
    assert line.images_per_s == 2.0
    assert line.times_the_first == 2.0
    assert line.spread == pytest.approx((2.5 - 1.0) / 2.0)


def test_percentiles_are_latencies_that_occurred() -> None:
    line = row(LOAD, "ours", [made_up(1, [float(number) for number in range(1, 101)], errors=3)], [made_up(1, [1.0])])
    assert (line.p50_s, line.p95_s, line.p99_s) == (50.0, 95.0, 99.0)
    assert line.mean_s == 50.5
    assert (line.latencies, line.errors) == (100, 3)


def test_percentiles_need_enough_latencies_and_a_failing_contender_does_not_end_the_benchmark() -> None:
    few = row(LOAD, "ours", [made_up(1, [1.0] * 19)], [made_up(1, [1.0])])
    assert (few.p50_s, few.p95_s, few.p99_s) == (1.0, None, None)
    none = row(LOAD, "ours", [made_up(1, [], errors=5)], [made_up(1, [1.0])])
    assert (none.images_per_s, none.mean_s, none.p50_s, none.errors) == (0.0, None, None, 5)
    assert "|  |" in markdown(Report({"commit": "abc"}, [none]))


class Worker:
    """Responds after a pause, and records how many requests were in progress at once."""

    def __init__(self, refuses: set[int]) -> None:
        self._refuses = refuses
        self.at_once = 0
        self.most_at_once = 0
        self.seeds: list[int] = []

    async def ask(self, wanted: Task) -> bool:
        self.seeds.append(wanted.seed)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0.01)
        self.at_once -= 1
        return wanted.seed not in self._refuses


def test_a_closed_loop_sends_each_task_once_with_at_most_one_request_per_client() -> None:
    worker = Worker(refuses={3})
    result = asyncio.run(play(loads.same_steps(64, 2, clients=3, requests_per_client=4), worker.ask))
    assert sorted(worker.seeds) == list(range(12))
    assert worker.most_at_once == 3
    assert (result.images, result.errors, len(result.latencies_s)) == (11, 1, 11)
    assert min(result.latencies_s) >= 0.01


def test_an_open_loop_does_not_wait_for_responses() -> None:
    worker = Worker(refuses=set())
    tasks = tuple(loads.task(number, 64, 2) for number in range(20))
    asyncio.run(play(Load("burst", tasks, arrivals_s=(0.0,) * 20), worker.ask))
    assert worker.most_at_once == 20


def test_poisson_arrivals_are_reproducible_and_have_the_requested_rate() -> None:
    few = loads.mixed_arrivals(64, 50, 24, per_s=4.0, share=0.8)
    assert 24 / few.arrivals_s[-1] == pytest.approx(4.0)
    load = loads.mixed_arrivals(64, 50, 2000, per_s=4.0, share=0.8)
    assert load == loads.mixed_arrivals(64, 50, 2000, per_s=4.0, share=0.8)
    assert load.name == "mixed, Poisson, 80 % of plain"
    gaps = np.diff(np.asarray(load.arrivals_s))
    assert gaps.mean() == pytest.approx(0.25, rel=0.1)
    assert gaps.std() == pytest.approx(0.25, rel=0.1), "as long as the mean: exponential"


def test_mixed_tasks_are_of_all_kinds_sizes_and_lengths() -> None:
    tasks = loads.mixed_tasks(64, 50, 24)
    assert {one.kind for one in tasks} == {"txt2img", "img2img", "inpaint"}
    assert {one.num_inference_steps for one in tasks} == {4, 12, 25, 50}
    assert {one.guidance_scale for one in tasks} == {1.0, 7.5}
    assert {one.width for one in tasks} == {64, 96}
    assert len({one.seed for one in tasks}) == 24
    assert all((one.image is None) == (one.kind == "txt2img") and (one.mask is None) == (one.kind != "inpaint") for one in tasks)


def test_only_the_short_requests_among_long_ones_are_counted() -> None:
    load = loads.short_among_long(64, 50, long=3, short=2, every_s=0.02)
    worker = Worker(refuses=set())
    result = asyncio.run(play(load, worker.ask))
    assert [one.num_inference_steps for one in load.tasks] == [50] * 3 + [4] * 2
    assert (result.images, len(result.latencies_s)) == (5, 2)


def test_plain_diffusers_generates_the_same_images_as_the_engine(recording_engine: RecordingEngine) -> None:
    plain = Plain(DEMO)
    for kind in loads.KINDS:
        tasks = [loads.task(number, 64, 4, kind=kind) for number in range(2)]
        ours = [np.asarray(picture.image).astype(int) for picture in recording_engine.draw(tasks)]
        theirs = [np.asarray(image).astype(int) for image in plain.generate(tasks)]
        assert max(np.abs(one - other).max() for one, other in zip(ours, theirs, strict=True)) <= 2


def test_all_contenders_run_small_loads_and_tables_and_a_plot_are_written(tmp_path: Path) -> None:
    report = Report({"commit": "abc", "model": "demo", "side": "64", "gpu": "none", "processor": "some"})
    wanted = [loads.same_steps(64, 2, 3, 2), loads.mixed(64, 4, 3, 6)]
    saved: list[int] = []
    with started([name for name in CONTENDERS if name not in ("auto", "graphs")], DEMO) as running:
        bench(running, wanted, rounds=1, report=report, save=lambda: saved.append(len(report.rows)))
    report.steps = [StepTime(1, 10.0, 9.5, 0.019, 4.0), StepTime(2, 11.0, 10.5, 0.038, 4.0)]
    names = ["plain diffusers", "engine", "this project, HTTP", "BentoML's batching, HTTP"]
    assert [line.contender for line in report.rows] == names * 2
    assert saved == [1, 2, 3, 4, 5, 6, 7, 8], "the results are saved after each run"
    assert all(line.errors == 0 and line.p50_s and 0 < line.p50_s < 60 for line in report.rows)
    plain, engine = report.rows[:2]
    assert plain.times_the_first == 1.0
    assert engine.rows_per_call is not None
    assert engine.rows_per_call > 2, "three clients with guidance share steps"
    assert [len(start.peak_memory_mib) for start in report.starts] == [1, 1, 4, 4], "a server has four processes"
    write(tmp_path, "small", report)
    assert json.loads((tmp_path / "small.json").read_text()) == json.loads(json.dumps(asdict(report)))
    assert (tmp_path / "small.md").read_text() == markdown(report)
    with Image.open(plot.write(tmp_path / "small.json")) as picture:
        assert len(picture.convert("RGB").getcolors(2**20) or []) > 10, "the plot must not be empty"


def test_if_time_runs_out_there_are_fewer_rounds_not_fewer_rows() -> None:
    class Contender:
        started_in_s = 1.0

        def __init__(self, name: str) -> None:
            self.name = name

        def generate(self, load: Load) -> Round:
            order.append(f"{load.name} {self.name}")
            if len(order) == 7:
                raise KeyboardInterrupt
            return made_up(1, [1.0])

        def end(self) -> None: ...

    order: list[str] = []
    report = Report({})
    few, many = (Load(name, (loads.task(0, 64, 2),), clients=1) for name in ("few", "many"))
    with pytest.raises(KeyboardInterrupt):
        bench([Contender("plain"), Contender("ours")], [few, many], rounds=2, report=report, save=lambda: None)
    assert order == ["few plain", "few ours", "many plain", "many ours", "few plain", "few ours", "many plain"]
    assert [(line.load, line.contender, line.rounds) for line in report.rows] == [
        ("few", "plain", 2),
        ("few", "ours", 2),
        ("many", "plain", 1),
        ("many", "ours", 1),
    ]


def test_contenders_that_start_at_once_share_the_batch_limit_that_the_engine_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    caches: dict[str, Path | None] = {}

    class Contender:
        started_in_s = 1.0

        def __init__(self, name: str, setup: Setup) -> None:
            self.name = name
            caches[name] = setup.cache

        def generate(self, load: Load) -> Round:
            raise AssertionError("nothing is asked for")

        def end(self) -> None: ...

    for name in ("plain", "engine", "http"):
        monkeypatch.setitem(CONTENDERS, name, partial(Contender, name))
    with started(["plain", "engine", "http"], DEMO, at_once=True) as running:
        assert [one.name for one in running] == ["plain", "engine", "http"]
    assert next(iter(caches)) == "engine"
    assert len(set(caches.values())) == 1
    assert caches["http"] is not None
    with started(["engine", "http"], DEMO):
        assert caches["http"] is None


def test_every_table_has_as_many_cells_in_each_line() -> None:
    line = Row("a load", 1, "ours", 3, 1.0, 0.1, 1.0, 30, 1.0, 1.0, 1.0, None, 0, None)
    report = Report({"commit": "abc"}, [line], [Start("ours", 1.0, (5.0, 4.0))], [StepTime(1, 10.0, 9.5, 0.019, 4.0)])
    tables = markdown(report).split("\n\n")[1:]
    assert len(tables) == 3
    assert all(len({one.count("|") for one in table.splitlines()}) == 1 for table in tables)
    assert "| 5.0 % | 0.019 | 2.000 | 50 % of 4.000 |" in tables[2]


def test_the_arithmetic_of_a_call_includes_all_of_its_rows(demo_parts: Parts) -> None:
    denoiser = Denoiser(demo_parts)
    of_one_job = count_tflop(denoiser, 64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        batch = [Job(loads.task(number, 64, 2), on_end=lambda outcome: None) for number in range(2)]
        for job in batch:
            job.tensors = denoiser.prepare(job.task)
        before = counter.get_total_flops()
        denoiser.predict(batch)
    assert counter.get_total_flops() - before == pytest.approx(2 * of_one_job * 1e12)


@pytest.mark.alone
def test_a_step_is_timed_with_its_unet_call_and_the_matrix_product(demo_parts: Parts) -> None:
    timed = time_step(Denoiser(demo_parts), 2, 64, tflop=0.001)
    assert timed is not None
    assert (timed.jobs, timed.tflop) == (2, 0.002)
    assert timed.step_ms > 0
    assert 0 < timed.share_of_matrix_product < 1.2


def test_a_contender_that_dies_while_it_loads_is_noticed() -> None:
    with pytest.raises(EOFError):
        InProcess("dies", die, DEMO)
