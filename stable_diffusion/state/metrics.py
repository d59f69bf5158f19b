"""Prometheus metrics: their names, how the engine's records change them, and the content of `/metrics`.

prometheus_client keeps counts in one file per process, in a folder that BentoML names, and adds them up for the page. The current state
of a runner (its model, its batch limits) comes from the runner's status file instead: an old label would stay in those files for ever.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from stable_diffusion.core.limits import MAX_PROMPT_CHUNKS
from stable_diffusion.core.telemetry import (
    DecodedAgainRecord,
    EndRecord,
    LorasRecord,
    Outcome,
    OutOfMemoryRecord,
    Record,
    Refusal,
    RefusalRecord,
    StartRecord,
    StepRecord,
    SubmitRecord,
    TurnRecord,
    WorkloadRecord,
)
from stable_diffusion.core.types import Kind
from stable_diffusion.state.jobs import WaitingWork
from stable_diffusion.state.runner_status import RunnerState, is_alive, living_runners

_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
_ROWS = (1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20)


@dataclass(frozen=True)
class _Series:
    queue_jobs: Gauge
    running_jobs: Gauge
    workload_seconds: Gauge
    pixel_steps_per_second: Gauge
    refused: Counter
    queue_wait_seconds: Histogram
    unet_rows: Histogram
    unet_rows_with_loras: Counter
    unet_calls: Counter
    prompt_chunks: Histogram
    loras: Gauge
    lora_bytes: Gauge
    step_seconds: Histogram
    image_seconds: Histogram
    images: Counter
    out_of_memory: Counter
    decoded_again: Counter


@functools.cache
def _series() -> _Series:
    # Created late and in runners only: BentoML names the folder of the files after it has imported the service.
    series = _Series(
        queue_jobs=Gauge("stable_diffusion_queue_jobs", "Images that wait for their first step.", multiprocess_mode="livesum"),
        running_jobs=Gauge("stable_diffusion_running_jobs", "Images that are being generated.", multiprocess_mode="livesum"),
        workload_seconds=Gauge(
            "stable_diffusion_workload_seconds",
            "Remaining accepted work, in estimated seconds of the device.",
            multiprocess_mode="livesum",
        ),
        pixel_steps_per_second=Gauge(
            "stable_diffusion_pixel_steps_per_second",
            "How fast the model processes work at the native size in full steps: pixels times steps; 0 until it was measured.",
            multiprocess_mode="livesum",
        ),
        refused=Counter("stable_diffusion_refused", "Images that were refused, by reason.", labelnames=["reason"]),
        queue_wait_seconds=Histogram(
            "stable_diffusion_queue_wait_seconds", "From the arrival of an image's task to its first step.", buckets=_SECONDS
        ),
        unet_rows=Histogram(
            "stable_diffusion_unet_rows", "Rows of a UNet call: two for an image with guidance, one without.", buckets=_ROWS
        ),
        unet_rows_with_loras=Counter("stable_diffusion_unet_rows_with_loras", "Rows of UNet calls that had LoRAs."),
        unet_calls=Counter(
            "stable_diffusion_unet_calls",
            "UNet calls by the way in which they were computed. What the way in use is not set up for is computed eagerly.",
            labelnames=["execution"],
        ),
        prompt_chunks=Histogram(
            "stable_diffusion_prompt_chunks",
            "Chunks of 75 tokens of an image's longest prompt.",
            buckets=tuple(range(1, MAX_PROMPT_CHUNKS + 1)),
        ),
        loras=Gauge("stable_diffusion_loras", "LoRAs on the device, in use or kept.", multiprocess_mode="livesum"),
        lora_bytes=Gauge("stable_diffusion_lora_bytes", "Bytes of device memory that LoRAs use.", multiprocess_mode="livesum"),
        step_seconds=Histogram(
            "stable_diffusion_step_seconds",
            "Wall time of one iteration of the engine's loop. On a GPU only the mean of many is meaningful.",
            buckets=_SECONDS,
        ),
        image_seconds=Histogram(
            "stable_diffusion_image_seconds", "From an image's first step to the finished image.", labelnames=["kind"], buckets=_SECONDS
        ),
        images=Counter("stable_diffusion_images", "Images that have ended, by outcome.", labelnames=["kind", "outcome"]),
        out_of_memory=Counter("stable_diffusion_out_of_memory", "Calls that did not fit into the device's memory, retried or not."),
        decoded_again=Counter(
            "stable_diffusion_decoded_again", "Images that came out black or with non-finite values and were decoded again in float32."
        ),
    )
    # Create the series at zero, so that the first image already counts as an increase.
    series.unet_calls.labels("eager")
    for reason in get_args(Refusal):
        series.refused.labels(reason)
    for kind in get_args(Kind):
        series.image_seconds.labels(kind)
        for outcome in get_args(Outcome):
            series.images.labels(kind, outcome)
    return series


def counting() -> Callable[[Record | StepRecord], None]:
    """Create the series of this process at zero. The returned function counts a record and may be called on any thread."""
    _series()
    return _count


def _count(record: Record | StepRecord) -> None:
    series = _series()
    match record:
        case StepRecord(rows=rows, rows_with_loras=rows_with_loras, execution=execution):
            series.unet_calls.labels(execution).inc()
            series.unet_rows.observe(rows)
            series.unet_rows_with_loras.inc(rows_with_loras)
        case TurnRecord(seconds):
            series.step_seconds.observe(seconds)
        case SubmitRecord():
            series.queue_jobs.inc()
        case RefusalRecord(reason):
            series.refused.labels(reason).inc()
        case WorkloadRecord(seconds, pixel_steps_per_s):
            series.workload_seconds.set(seconds)
            series.pixel_steps_per_second.set(pixel_steps_per_s)
        case StartRecord(waited_s, chunks):
            series.prompt_chunks.observe(chunks)
            series.queue_jobs.dec()
            series.running_jobs.inc()
            series.queue_wait_seconds.observe(waited_s)
        case EndRecord(kind, outcome, generation_s):
            (series.queue_jobs if generation_s is None else series.running_jobs).dec()
            series.images.labels(kind, outcome).inc()
            if generation_s is not None and outcome in ("completed", "flagged"):
                series.image_seconds.labels(kind).observe(generation_s)
        case LorasRecord(count, size_bytes):
            series.loras.set(count)
            series.lora_bytes.set(size_bytes)
        case OutOfMemoryRecord():
            series.out_of_memory.inc()
        case DecodedAgainRecord():
            series.decoded_again.inc()


def page(is_store_reachable: bool | None = None, waiting: WaitingWork | None = None) -> bytes:
    """The counts of all processes of the server, including BentoML's own metrics, in Prometheus' text format. Reads files.

    `is_store_reachable`: of the store that machines share; None if they share none. `waiting`: in the queue there; None if unknown.
    """
    registry = CollectorRegistry()
    _forget_the_dead(Path(os.environ[_FOLDER_VARIABLE]))
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    runners = living_runners()
    ready = sum(runner.stage == "ready" for runner in runners)
    workload_s = registry.get_sample_value("stable_diffusion_workload_seconds") or 0.0
    speed = registry.get_sample_value("stable_diffusion_pixel_steps_per_second") or 0.0
    registry.register(_CurrentState(runners, is_store_reachable, backlog_s(workload_s, speed, ready, waiting)))
    return generate_latest(registry)


def backlog_s(workload_s: float, pixel_steps_per_s: float, runners: int, waiting: WaitingWork | None) -> float:
    """Seconds until the work that waits for this server is done: its own, and its share of what waits in the queue that machines share.

    `workload_s` and `pixel_steps_per_s` are sums over the server's `runners`. The others are taken to be as fast as these.
    """
    own_s = workload_s / max(1, runners)
    if waiting is None or not pixel_steps_per_s:
        return own_s
    return own_s + waiting.pixel_steps / (pixel_steps_per_s / max(1, runners)) / max(1, waiting.runners)


def _forget_the_dead(folder: Path) -> None:
    """Remove the live gauges of killed processes, which would otherwise count for ever."""
    for file in folder.glob("gauge_live*_*.db"):
        pid = re.search(r"_(\d+)\.db$", file.name)
        if pid and not is_alive(int(pid[1])):
            mark_process_dead(int(pid[1]), str(folder))  # type: ignore[no-untyped-call]


class _CurrentState:
    """A collector for the current state of each runner, of what waits for them and of the store that machines share."""

    def __init__(self, runners: list[RunnerState], is_store_reachable: bool | None, backlog_s: float) -> None:
        self._runners = runners
        self._is_store_reachable = is_store_reachable
        self._backlog_s = backlog_s

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield _caps(self._runners)
        yield _models(self._runners)
        yield _executions(self._runners)
        yield _backlog(self._backlog_s)
        if self._is_store_reachable is not None:
            yield _shared_state(self._is_store_reachable)


def _backlog(seconds: float) -> GaugeMetricFamily:
    meaning = "Estimated seconds until the server has done its accepted work and its share of the queue that machines share."
    return GaugeMetricFamily("stable_diffusion_backlog_seconds", meaning, value=seconds)


def _shared_state(is_reachable: bool) -> GaugeMetricFamily:
    """Only where SD_SHARED_STATE is set."""
    meaning = "1 if the store that the machines share answers, else 0; only where SD_SHARED_STATE is set."
    return GaugeMetricFamily("stable_diffusion_shared_state_reachable", meaning, value=is_reachable)


def _caps(runners: list[RunnerState]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(
        "stable_diffusion_step_cap_pictures",
        "How many images of a size may share a step, and why: the model's native size, and sizes that ran out of memory.",
        labels=["runner", "width", "height", "reason"],
    )
    for runner in runners:
        for batch_limit in runner.batch_limits:
            family.add_metric([str(runner.index), str(batch_limit.width), str(batch_limit.height), batch_limit.reason], batch_limit.images)
    return family


def _models(runners: list[RunnerState]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(
        "stable_diffusion_model_info",
        "Always 1: the model that a runner has loaded, the requested precision, and the device and dtype of the computation.",
        labels=["runner", "model", "precision", "device", "dtype"],
    )
    for runner in runners:
        if runner.placement is not None:
            labels = [str(runner.index), runner.model, runner.precision, runner.placement.device, runner.placement.dtype]
            family.add_metric(labels, 1)
    return family


def _executions(runners: list[RunnerState]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(
        "stable_diffusion_execution_info",
        "Always 1: the way in which a runner computes UNet calls, and why.",
        labels=["runner", "execution", "reason"],
    )
    for runner in runners:
        if runner.execution is not None:
            family.add_metric([str(runner.index), runner.execution.way, runner.execution.reason], 1)
    return family
