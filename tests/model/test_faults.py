"""What goes wrong in one job stays in it, and what can be made good is. Hundreds of jobs at once, each with a fault of its own or none."""

from __future__ import annotations

import queue
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from stable_diffusion.core.errors import DeadlineExceeded, GenerationFailed, ModelUnavailable, ServiceError
from stable_diffusion.core.telemetry import DecodedAgainRecord, EndRecord, OutOfMemoryRecord, Record, SubmitRecord
from stable_diffusion.core.types import GeneratedImage, Task
from stable_diffusion.engine.engine import Engine
from stable_diffusion.engine.loading import Parts
from stable_diffusion.engine.watchdog import Watchdog
from tests import faults
from tests.model.recording_engine import RecordingEngine
from tests.model.reference import largest_difference
from tests.tasks import make_task

Outcome = GeneratedImage | ServiceError
PROMPT = "a red circle on a blue background"
LEVELS = 2  # of 255, in company


class Running:
    def __init__(self, parts: Parts, watchdog: Watchdog | None = None) -> None:
        self.records: list[Record] = []
        self.outcomes: queue.SimpleQueue[tuple[int, Outcome]] = queue.SimpleQueue()
        self.engine = Engine(lambda: faults.FaultyDenoiser(parts), 10, on_record=self.records.append, watchdog=watchdog)

    def submit(self, number: int, task: Task, **options: float) -> None:
        self.engine.submit(task, lambda outcome: self.outcomes.put((number, outcome)), **options)  # type: ignore[arg-type]

    def draw(self, task: Task) -> Outcome:
        self.submit(0, task)
        return self.outcomes.get(timeout=60)[1]


@contextmanager
def running(parts: Parts, watchdog: Watchdog | None = None) -> Iterator[Running]:
    made = Running(parts, watchdog)
    try:
        yield made
    finally:
        made.engine.close()


@pytest.mark.parametrize("fault", faults.DECODED_AGAIN)
def test_a_picture_that_comes_out_black_or_as_no_numbers_is_decoded_again_and_says_so(
    demo_parts: Parts, recording_engine: RecordingEngine, fault: str
) -> None:
    task = make_task(prompt=f"{PROMPT} {fault}", num_inference_steps=4)
    (whole,) = recording_engine.draw([task])
    with running(demo_parts) as made:
        mended = made.draw(task)
        assert isinstance(mended, GeneratedImage)
        assert (mended.decoded_again, whole.decoded_again) == (True, False)
        assert mended.image.tobytes() == whole.image.tobytes()
        assert [type(record) for record in made.records].count(DecodedAgainRecord) == 1


def test_decoding_again_is_in_float32_and_leaves_the_shared_autoencoder_as_it_was(demo_parts: Parts) -> None:
    half = demo_parts.vae.__class__.from_config(demo_parts.vae.config)
    half.load_state_dict(demo_parts.vae.state_dict())
    parts = Parts(**{**vars(demo_parts), "vae": half.bfloat16().eval()})
    used: list[torch.dtype] = []

    class Watched(faults.FaultyDenoiser):
        def _to_pixels(self, vae: torch.nn.Module, state: object) -> torch.Tensor:
            used.append(next(vae.parameters()).dtype)
            return super()._to_pixels(vae, state)  # type: ignore[arg-type]

    engine = Engine(lambda: Watched(parts), 1)
    outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    engine.submit(make_task(prompt=f"{PROMPT} {faults.DECODES_TO_NAN}", num_inference_steps=2), outcomes.put)
    assert isinstance(outcomes.get(timeout=60), GeneratedImage)
    engine.close()
    assert used == [torch.bfloat16, torch.float32]
    assert next(half.parameters()).dtype == torch.bfloat16


def test_a_picture_that_cannot_be_decoded_at_all_fails_by_name(demo_parts: Parts) -> None:
    with running(demo_parts) as made:
        assert "even in float32" in str(made.draw(make_task(prompt=faults.NEVER_DECODES, num_inference_steps=2)))


def test_a_picture_that_is_black_by_right_stays_so(demo_parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    class Black(faults.FaultyDenoiser):
        def _to_pixels(self, vae: object, state: object) -> torch.Tensor:
            return torch.full((1, 3, 64, 64), -1.0)

    engine = Engine(lambda: Black(demo_parts), 1)
    outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    engine.submit(make_task(num_inference_steps=2), outcomes.put)
    picture = outcomes.get(timeout=60)
    engine.close()
    assert isinstance(picture, GeneratedImage)
    assert picture.image.getextrema() == ((0, 0), (0, 0), (0, 0))


def test_memory_that_a_cpu_cannot_give_splits_the_batch_too(demo_parts: Parts) -> None:
    class Small(faults.FaultyDenoiser):
        def predict(self, jobs: object) -> list[torch.Tensor]:
            if len(jobs) > 1:  # type: ignore[arg-type]
                torch.empty(2**60)
            return super().predict(jobs)  # type: ignore[arg-type]

    records: list[Record] = []
    engine = Engine(lambda: Small(demo_parts), 4, on_record=records.append)
    outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    for seed in range(3):
        engine.submit(make_task(seed=seed, num_inference_steps=3), outcomes.put)
    assert all(isinstance(outcomes.get(timeout=60), GeneratedImage) for _ in range(3))
    engine.close()
    assert any(isinstance(record, OutOfMemoryRecord) for record in records)


def test_a_job_that_is_late_is_dropped_before_its_next_step_and_its_neighbour_goes_on(demo_parts: Parts) -> None:
    with running(demo_parts) as made:
        made.submit(1, make_task(num_inference_steps=150), timeout_s=0.4)
        made.submit(2, make_task(num_inference_steps=30, seed=2))
        began = time.monotonic()
        number, late = made.outcomes.get(timeout=60)
        assert time.monotonic() - began < 5, "its 150 steps would take far longer"
        assert (number, type(late)) == (1, DeadlineExceeded)
        assert isinstance(made.outcomes.get(timeout=60)[1], GeneratedImage)
        assert [record.outcome for record in made.records if isinstance(record, EndRecord)] == ["deadline_exceeded", "completed"]


def test_a_device_that_fails_is_the_end_of_all_jobs_and_of_the_process(demo_parts: Parts) -> None:
    ended: list[str] = []

    class Recorded(Watchdog):
        def end_process(self) -> None:
            ended.append("ended")

    with running(demo_parts, Recorded(60)) as made:
        made.submit(1, make_task(num_inference_steps=150))
        made.submit(2, make_task(prompt=faults.DEVICE_FAILS, num_inference_steps=10, seed=3))
        outcomes = dict(made.outcomes.get(timeout=60) for _ in range(2))
    assert all(isinstance(outcome, ModelUnavailable) for outcome in outcomes.values())
    assert ended == ["ended"]


def test_a_turn_that_hangs_ends_the_process_and_the_log_says_where() -> None:
    code = """
import time
from stable_diffusion.engine.watchdog import Watchdog
watchdog = Watchdog(0.5)
for _ in range(3):
    with watchdog.watching(0.0):
        time.sleep(0.3)
time.sleep(0.6)
def step_that_hangs():
    time.sleep(60)
with watchdog.watching(0.01):
    step_that_hangs()
"""
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1
    assert time.monotonic() - began < 25
    assert "step_that_hangs" in ended.stderr


def test_hundreds_of_mixed_jobs_with_faults_at_random_moments_come_out_even_and_survivors_are_their_solo_selves(
    demo_parts: Parts,
    recording_engine: RecordingEngine,
    input_picture: Image.Image,
    right_half_mask: Image.Image,
) -> None:
    chance = random.Random(6)
    sound: list[dict[str, object]] = [
        {"num_inference_steps": 4},
        {"num_inference_steps": 7, "scheduler": "EulerAncestralDiscreteScheduler", "guidance_scale": 3.0},
        {"kind": "img2img", "image": input_picture, "strength": 0.7, "num_inference_steps": 6},
        {"kind": "inpaint", "image": input_picture, "mask": right_half_mask, "strength": 0.9, "num_inference_steps": 5},
    ]
    seeds = range(3)
    alone = {
        (shape, seed): recording_engine.draw([make_task(prompt=PROMPT, seed=seed, **sound[shape])])[0].image
        for shape in range(len(sound))
        for seed in seeds
    }
    cancelled = 0
    told_all_the_same: list[Outcome] = []
    with running(demo_parts) as made:
        asked: dict[int, tuple[int, int, str]] = {}
        cancel: list[Callable[[], None]] = []
        for number in range(200):
            shape, seed = chance.randrange(len(sound)), chance.choice(seeds)
            fault = chance.choice(("", "", "", "cancelled", *faults.FAILING, *faults.CONTAINED))
            # A size of its own for what lowers the cap, so that the others go on in company.
            size = {"width": 72} if fault in (faults.FITS_ALONE_ONLY, faults.FITS_NEVER) else {}
            changes = {**sound[shape], **size, "prompt": PROMPT if fault in ("", "cancelled") else f"{PROMPT} {fault}", "seed": seed}
            if size and sound[shape].get("image") is not None:
                changes = {**changes, **sound[0], "kind": "txt2img", "image": None, "mask": None}
            task = make_task(**changes)
            if fault == "cancelled":
                cancelled += 1
                job = made.engine.submit(task, told_all_the_same.append)
                cancel.append(lambda job=job: made.engine.cancel(job))  # type: ignore[misc]
                if chance.random() < 0.5:
                    cancel.pop()()
            else:
                asked[number] = shape, seed, fault
                made.submit(number, task)
            if chance.random() < 0.2:
                time.sleep(0.02)
        for one in cancel:
            one()
        ledger: dict[int, list[Outcome]] = {number: [] for number in asked}
        for _ in asked:
            number, outcome = made.outcomes.get(timeout=120)
            ledger[number].append(outcome)
        # Whatever is cancelled has left by the time that another job is done.
        assert isinstance(made.draw(make_task(num_inference_steps=2)), GeneratedImage)
        submitted = [record for record in made.records if isinstance(record, SubmitRecord)]
        ended = [record for record in made.records if isinstance(record, EndRecord)]
    assert made.outcomes.empty()
    assert len(submitted) == len(ended) == 201
    for number, (shape, seed, fault) in asked.items():
        [outcome] = ledger[number]
        if fault in faults.FAILING:
            assert isinstance(outcome, GenerationFailed), (fault, outcome)
            continue
        assert isinstance(outcome, GeneratedImage), (fault, outcome)
        assert outcome.decoded_again == (fault in faults.DECODED_AGAIN)
        if not fault:
            assert largest_difference(outcome.image, alone[shape, seed]) <= LEVELS
    endings = Counter(record.outcome for record in ended)
    print(f"200 jobs: {dict(endings)}")
    assert endings["cancelled"] + len(told_all_the_same) == cancelled
    assert endings["cancelled"] > 0
