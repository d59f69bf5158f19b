"""What the engine tells of its work adds up: every job that is submitted starts or not, and ends once."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from PIL import Image

from stable_diffusion.core.errors import GenerationFailed, ServiceError
from stable_diffusion.core.telemetry import (
    BatchLimitRecord,
    EndRecord,
    OutOfMemoryRecord,
    Record,
    StartRecord,
    SubmitRecord,
    TurnRecord,
    WorkloadRecord,
)
from stable_diffusion.core.types import GeneratedImage, Task
from stable_diffusion.engine.engine import Engine
from stable_diffusion.engine.job import Conditioning, Job, Latents
from stable_diffusion.engine.lora_store import Claim
from tests.tasks import make_task


class CountingSteps:
    """Takes steps that compute nothing: what a task's prompt says goes wrong with it."""

    execution = "eager"
    decode_counts: Mapping[int, float] = {}

    def __init__(self) -> None:
        self.jobs_that_fit = 100
        self.at_call: Callable[[], object] = lambda: None

    def can_prepare(self, job: Job) -> bool:
        return True

    def prepare(self, task: Task, claim: Claim | None = None) -> Latents:
        if task.prompt == "breaks when it is prepared":
            raise RuntimeError("on purpose")
        nothing = torch.zeros(1)
        timesteps = torch.arange(task.num_inference_steps)
        return Latents(nothing, Conditioning(()), None, timesteps, timesteps, torch.Generator(), {}, "", "", guided_steps=0)

    def loras_held(self) -> tuple[int, int]:
        return 0, 0

    def predict(self, jobs: Sequence[Job]) -> list[torch.Tensor]:
        self.at_call()
        if len(jobs) > self.jobs_that_fit:
            raise torch.OutOfMemoryError("on purpose")
        return [torch.zeros(1) for _ in jobs]

    def advance(self, job: Job, predicted: torch.Tensor) -> None:
        assert job.tensors is not None
        job.tensors.step_index += 1

    def decode_together(self, jobs: Sequence[Job]) -> list[GeneratedImage | Exception]:
        (job,) = jobs
        return [self.decode(job)]

    def decode(self, job: Job) -> GeneratedImage:
        if job.task.prompt == "turns NaN":
            raise GenerationFailed("on purpose")
        return GeneratedImage(Image.new("RGB", (8, 8)), job.task.prompt == "is flagged", "", "")


class Counted:
    def __init__(self, steps: CountingSteps) -> None:
        self.records: list[Record] = []
        self.outcomes: queue.SimpleQueue[GeneratedImage | ServiceError] = queue.SimpleQueue()
        self.engine = Engine(lambda: steps, 4, on_record=self.records.append)

    def submit(self, prompt: str = "", **changes: object) -> Job:
        return self.engine.submit(make_task(prompt=prompt, num_inference_steps=3, **changes), self.outcomes.put)

    def finish(self, outcomes: int) -> None:
        for _ in range(outcomes):
            self.outcomes.get(timeout=30)
        self.engine.close()

    def of(self, kind: type) -> list[Record]:
        return [record for record in self.records if isinstance(record, kind)]

    def endings(self) -> list[tuple[str, str]]:
        return [(record.kind, record.outcome) for record in self.records if isinstance(record, EndRecord)]


@pytest.mark.parametrize(
    ("prompt", "outcome"),
    [("", "completed"), ("is flagged", "flagged"), ("turns NaN", "failed")],
)
def test_a_job_is_submitted_starts_and_ends_with_its_kind_and_outcome(prompt: str, outcome: str) -> None:
    counted = Counted(CountingSteps())
    counted.submit(prompt, kind="inpaint")
    counted.finish(1)
    assert [type(record) for record in counted.records if not isinstance(record, TurnRecord | WorkloadRecord)] == [
        SubmitRecord,
        StartRecord,
        EndRecord,
    ]
    [started], [ended] = counted.of(StartRecord), counted.of(EndRecord)
    assert isinstance(started, StartRecord)
    assert isinstance(ended, EndRecord)
    assert started.waited_s >= 0
    assert ended.generation_s is not None
    assert ended.generation_s >= 0
    assert counted.endings() == [("inpaint", outcome)]
    assert len(counted.of(TurnRecord)) == 3, "one for each step"


def test_a_job_that_breaks_before_its_first_step_never_started() -> None:
    counted = Counted(CountingSteps())
    counted.submit("breaks when it is prepared")
    counted.finish(1)
    assert counted.of(StartRecord) == []
    assert counted.of(EndRecord) == [EndRecord("txt2img", "failed", None)]


def test_cancelled_jobs_end_as_cancelled_whether_they_had_started_or_not() -> None:
    steps = CountingSteps()
    counted = Counted(steps)
    jobs: list[Job] = []

    def cancel_all() -> None:
        steps.at_call = lambda: None
        jobs.append(counted.submit())
        for job in jobs:
            counted.engine.cancel(job)
        counted.submit()

    steps.at_call = cancel_all
    jobs.append(counted.submit())
    counted.finish(1)
    endings = [record for record in counted.records if isinstance(record, EndRecord)]
    assert [(record.outcome, record.generation_s is None) for record in endings] == [
        ("cancelled", False),
        ("cancelled", True),
        ("completed", False),
    ]
    assert len(counted.of(SubmitRecord)) == 3


def test_out_of_memory_is_told_with_the_cap_that_follows_and_costs_no_picture_that_fits_alone() -> None:
    steps = CountingSteps()
    counted = Counted(steps)

    def four_more() -> None:
        steps.at_call = lambda: None
        for _ in range(4):
            counted.submit()

    steps.at_call, steps.jobs_that_fit = four_more, 2
    counted.submit(width=72)  # alone in its size: the four meet in the next turn
    counted.finish(5)
    assert counted.endings() == [("txt2img", "completed")] * 5
    assert len(counted.of(OutOfMemoryRecord)) == 1
    assert counted.of(BatchLimitRecord) == [BatchLimitRecord(64, 64, 2, 4)]


def test_a_picture_that_fits_once_memory_is_freed_is_drawn_and_the_cap_stays() -> None:
    steps = CountingSteps()
    calls: list[int] = []

    def first_one_fails() -> None:
        calls.append(1)
        steps.jobs_that_fit = 0 if len(calls) == 1 else 100

    steps.at_call = first_one_fails
    counted = Counted(steps)
    counted.submit()
    counted.finish(1)
    assert counted.endings() == [("txt2img", "completed")]
    assert len(counted.of(OutOfMemoryRecord)) == 1
    assert counted.of(BatchLimitRecord) == []


def test_a_picture_that_does_not_fit_even_alone_ends_out_of_memory() -> None:
    steps = CountingSteps()
    steps.jobs_that_fit = 0
    counted = Counted(steps)
    counted.submit()
    counted.finish(1)
    assert counted.endings() == [("txt2img", "out_of_memory")]
    assert len(counted.of(OutOfMemoryRecord)) == 2, "it was tried once more"
