"""Counts of several processes add up, and a process that was killed is not counted as working for ever."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stable_diffusion.state.jobs import WaitingWork
from stable_diffusion.state.metrics import backlog_s

# In processes of their own: prometheus_client decides when it is imported whether it counts for several processes.
COUNT = """
import os, sys
from stable_diffusion.core.telemetry import *
from stable_diffusion.state.metrics import counting
count = counting()
for _ in range(3):
    count(SubmitRecord())
count(StartRecord(0.5))
count(StepRecord((1,), 2, 1))
count(StepRecord((1, 2), 4, 0, "graphs"))
count(LorasRecord(3, 1000))
count(TurnRecord(400.0))
count(EndRecord("txt2img", "flagged", 300.0))
count(StartRecord(599.0, 4))
count(OutOfMemoryRecord())
count(RefusalRecord("queue_full"))
count(WorkloadRecord(12.5, 1000.0))
count(DecodedAgainRecord())
sys.stdout.write("counted\\n")
sys.stdout.flush()
sys.stdin.read()
"""
PAGE = "from stable_diffusion.state.metrics import page; print(page().decode())"


def test_counts_of_two_processes_are_added_up_and_a_dead_ones_gauges_go(tmp_path: Path) -> None:
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "SD_SHARED_FOLDER": str(tmp_path / "shared")}
    start = [sys.executable, "-W", "ignore", "-c"]
    counting = [
        subprocess.Popen([*start, COUNT], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]

    def page() -> dict[str, float]:
        shown = subprocess.run([*start, PAGE], env=environment, capture_output=True, text=True, check=True).stdout
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in shown.splitlines() if line[:1] not in ("#", ""))}

    for process in counting:
        assert process.stdout is not None
        assert process.stdout.readline() == "counted\n"
    both = page()
    counting[0].kill()
    counting[0].communicate()
    one = page()
    counting[1].communicate()
    assert both["stable_diffusion_queue_jobs"] == 2
    assert both["stable_diffusion_running_jobs"] == 2
    assert one["stable_diffusion_queue_jobs"] == 1
    assert one["stable_diffusion_running_jobs"] == 1
    assert (both["stable_diffusion_workload_seconds"], one["stable_diffusion_workload_seconds"]) == (25, 12.5)
    assert (both["stable_diffusion_pixel_steps_per_second"], one["stable_diffusion_pixel_steps_per_second"]) == (2000, 1000)
    assert (both["stable_diffusion_backlog_seconds"], one["stable_diffusion_backlog_seconds"]) == (25, 12.5)
    assert (both["stable_diffusion_loras"], one["stable_diffusion_loras"]) == (6, 3)
    assert (both["stable_diffusion_lora_bytes"], one["stable_diffusion_lora_bytes"]) == (2000, 1000)
    for shown in (both, one):
        assert shown['stable_diffusion_unet_calls_total{execution="eager"}'] == 2
        assert shown['stable_diffusion_unet_calls_total{execution="graphs"}'] == 2
        assert shown['stable_diffusion_images_total{kind="txt2img",outcome="flagged"}'] == 2
        assert shown['stable_diffusion_images_total{kind="inpaint",outcome="cancelled"}'] == 0
        assert shown["stable_diffusion_out_of_memory_total"] == 2
        assert shown["stable_diffusion_decoded_again_total"] == 2
        assert shown['stable_diffusion_refused_total{reason="queue_full"}'] == 2
        assert shown['stable_diffusion_refused_total{reason="deadline_exceeded"}'] == 0
        assert shown['stable_diffusion_queue_wait_seconds_bucket{le="300.0"}'] == 2
        assert shown['stable_diffusion_queue_wait_seconds_bucket{le="600.0"}'] == 4
        assert shown['stable_diffusion_image_seconds_sum{kind="txt2img"}'] == 600
        assert shown["stable_diffusion_unet_rows_sum"] == 12
        assert shown["stable_diffusion_unet_rows_with_loras_total"] == 2
        assert shown['stable_diffusion_prompt_chunks_bucket{le="1.0"}'] == 2
        assert shown["stable_diffusion_prompt_chunks_sum"] == 10
        assert shown["stable_diffusion_step_seconds_sum"] == 800


@pytest.mark.parametrize(
    ("workload_s", "speed", "runners", "waiting", "expected_s"),
    [
        (12.0, 1000.0, 1, None, 12.0),
        (12.0, 1000.0, 2, None, 6.0),  # two model processes work at once
        (12.0, 1000.0, 1, WaitingWork(60_000, 4), 12.0 + 15.0),  # a quarter of the minute that waits
        (12.0, 2000.0, 2, WaitingWork(60_000, 4), 6.0 + 15.0),  # two of the four are here
        (12.0, 0.0, 1, WaitingWork(60_000, 4), 12.0),  # before the speed was measured
        (12.0, 1000.0, 1, WaitingWork(60_000, 0), 12.0 + 60.0),  # none has reported yet: this one would have all
        (0.0, 0.0, 0, None, 0.0),
    ],
)
def test_what_waits_is_the_servers_own_work_and_its_share_of_the_shared_queue(
    workload_s: float, speed: float, runners: int, waiting: WaitingWork | None, expected_s: float
) -> None:
    assert backlog_s(workload_s, speed, runners, waiting) == pytest.approx(expected_s)
