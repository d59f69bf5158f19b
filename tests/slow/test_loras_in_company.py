"""Two hundred jobs of all kinds, with LoRAs, long and composed prompts, arriving at random: each is drawn as if it were alone."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from stable_diffusion.core.errors import ServiceError
from stable_diffusion.core.prompt_syntax import composed
from stable_diffusion.core.schedulers import SCHEDULERS
from stable_diffusion.core.telemetry import EndRecord, LorasRecord, Record, StepRecord
from stable_diffusion.core.types import GeneratedImage, Kind, LoraChoice, Task
from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.engine import Engine
from stable_diffusion.engine.job import Job
from stable_diffusion.engine.loading import Parts, load
from stable_diffusion.engine.lora_store import LoraStore
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from stable_diffusion.models.loras import LoraFile, LoraFolder
from tests.lora_files import ATTENTION, CONVOLUTIONS, FEED_FORWARD, TEXT_ENCODER, changes, save_as_diffusers, save_as_kohya
from tests.tasks import make_task

JOBS = 200
COMPARED = 40
CANCELLED_EVERY = 9
LORAS_THAT_FIT = 4  # of 6
KINDS: tuple[Kind, ...] = ("txt2img", "img2img", "inpaint")
WORDS = "a small red circle on a blue background, "
PROMPTS = (
    "a red circle",
    "a (green:1.3) square on [red] ground",
    WORDS * 10,  # 2 chunks
    WORDS * 17,  # 3 chunks
    WORDS * 25,  # 4 chunks
    "a red circle AND a blue square :0.5",
    "a [red|green|blue] circle",
    "a [red:blue:0.5] [circle|square] BREAK on a green background",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoraFile]:
    folder = tmp_path_factory.mktemp("loras")
    layers = ATTENTION | FEED_FORWARD | CONVOLUTIONS
    for seed in range(3):
        save_as_diffusers(folder / f"plain{seed}.safetensors", changes(ATTENTION, seed=seed, size=0.05))
    save_as_kohya(folder / "locon.safetensors", changes(layers, seed=3, size=0.05))
    save_as_kohya(folder / "text0.safetensors", changes(ATTENTION, seed=4, size=0.05), changes(TEXT_ENCODER, seed=5))
    save_as_diffusers(folder / "text1.safetensors", {}, changes(TEXT_ENCODER, seed=6))
    return dict(LoraFolder(folder, check_model(DEMO_FOLDER)).look().files)


@pytest.fixture(scope="module")
def parts(files: dict[str, LoraFile]) -> Parts:
    return load(replace(check_model(DEMO_FOLDER), loras=files["locon"].path.parent), "fp32")


@pytest.fixture(scope="module")
def max_bytes(files: dict[str, LoraFile]) -> int:
    return sum(sorted(file.size_bytes for file in files.values())[-LORAS_THAT_FIT:])


def random_task(chance: random.Random, files: dict[str, LoraFile], picture: Image.Image, mask: Image.Image) -> Task:
    kind = chance.choice(KINDS)
    prompt = chance.choice(PROMPTS)
    chosen = chance.sample(sorted(files), chance.choice((0, 0, 1, 1, 2, 3)))
    return make_task(
        kind=kind,
        prompt=prompt,
        negative_prompt=chance.choice(("", "green", WORDS * 12)),
        prompt_syntax="a1111",
        parts=len(composed(prompt)),
        num_inference_steps=chance.randint(2, 5),
        guidance_scale=chance.choice((1.0, 4.0, 7.5)),
        guidance_end=chance.choice((1.0, 1.0, 0.5)),
        seed=chance.randrange(2**32),
        scheduler=chance.choice(list(SCHEDULERS)),
        clip_skip=chance.choice((1, 1, 2)),
        strength=1.0 if kind == "txt2img" else 0.8,
        image=None if kind == "txt2img" else picture,
        mask=mask if kind == "inpaint" else None,
        loras=tuple(
            LoraChoice(name, (weight := chance.uniform(-1, 1)), weight, files[name].hash, files[name].size_bytes) for name in chosen
        ),
    )


class Crowd:
    """An engine whose LoRAs do not all fit, and what it has told."""

    def __init__(self, parts: Parts, max_bytes: int) -> None:
        self.records: list[Record] = []
        self.steps: list[StepRecord] = []
        self.images: dict[int, GeneratedImage | ServiceError] = {}
        self._ended = threading.Semaphore(0)
        denoiser = Denoiser(parts)
        denoiser.loras = LoraStore(parts.loras, parts.device, parts.dtype, max_bytes)
        self.engine = Engine(lambda: denoiser, 8, on_step=self.steps.append, on_record=self._note)

    def _note(self, record: Record) -> None:
        self.records.append(record)
        if isinstance(record, EndRecord):
            self._ended.release()

    def submit(self, number: int, task: Task) -> Job:
        def end(outcome: GeneratedImage | ServiceError) -> None:
            self.images[number] = outcome

        return self.engine.submit(task, end, owner=f"owner {number % 5}")

    def wait(self, jobs: int) -> None:
        for _ in range(jobs):
            assert self._ended.acquire(timeout=120), "a job does not end"


@pytest.fixture(scope="module")
def crowd(parts: Parts, max_bytes: int) -> Iterator[Crowd]:
    crowd = Crowd(parts, max_bytes)
    yield crowd
    crowd.engine.close()


def levels_apart(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


def test_each_of_two_hundred_jobs_is_drawn_as_alone(
    crowd: Crowd, files: dict[str, LoraFile], max_bytes: int, input_picture: Image.Image, right_half_mask: Image.Image
) -> None:
    chance = random.Random(17)
    tasks = [random_task(chance, files, input_picture, right_half_mask) for _ in range(JOBS)]
    cancelled = set(range(CANCELLED_EVERY, JOBS, CANCELLED_EVERY))
    began_s = time.monotonic()
    for number, task in enumerate(tasks):
        job = crowd.submit(number, task)
        if number in cancelled:
            threading.Timer(chance.uniform(0, 1), crowd.engine.cancel, [job]).start()
        time.sleep(chance.expovariate(1 / 0.05))
    crowd.wait(JOBS)
    company_s = time.monotonic() - began_s
    outcomes = [record.outcome for record in crowd.records if isinstance(record, EndRecord)]
    assert set(outcomes) <= {"completed", "cancelled"}, [one for one in crowd.images.values() if isinstance(one, ServiceError)]
    assert outcomes.count("completed") >= JOBS - len(cancelled)
    drawn = {number: image.image for number, image in crowd.images.items() if isinstance(image, GeneratedImage)}
    held = [record.size_bytes for record in crowd.records if isinstance(record, LorasRecord)]
    assert 0 < max(held) <= max_bytes
    mixed = sum(0 < step.rows_with_loras < step.rows for step in crowd.steps)
    shared = statistics_of(crowd.steps)
    assert mixed > 20, "rows with and without LoRAs shared calls"

    compared = chance.sample(sorted(drawn), COMPARED)
    apart = {}
    for number in compared:
        crowd.submit(JOBS + number, tasks[number])
        crowd.wait(1)
        alone = crowd.images[JOBS + number]
        assert isinstance(alone, GeneratedImage), alone
        apart[number] = levels_apart(alone.image, drawn[number])
    print(f"{company_s:.0f} s in company, {shared}, {mixed} calls with and without LoRAs, levels apart {sorted(apart.values())}")
    too_far = {number: (levels, tasks[number]) for number, levels in apart.items() if levels > 2}
    assert too_far == {}


def statistics_of(steps: list[StepRecord]) -> str:
    jobs = [len(step.job_numbers) for step in steps]
    return f"{len(steps)} calls, {sum(jobs) / len(jobs):.1f} jobs a call"


def test_jobs_whose_loras_do_not_fit_together_wait_and_are_drawn_while_others_go_on(
    crowd: Crowd, files: dict[str, LoraFile], max_bytes: int
) -> None:
    crowd.images.clear()
    names = sorted(files, key=lambda name: -files[name].size_bytes)[:6]
    numbers = itertools.count()
    for _ in range(3):
        for chosen in itertools.combinations(names, 3):
            loras = tuple(LoraChoice(name, 0.5, 0.5, files[name].hash, files[name].size_bytes) for name in chosen)
            crowd.submit(next(numbers), make_task(loras=loras, num_inference_steps=2, scheduler="DDIMScheduler"))
        crowd.submit(next(numbers), make_task(num_inference_steps=2, scheduler="DDIMScheduler"))
    jobs = next(numbers)
    crowd.wait(jobs)
    assert len(crowd.images) == jobs
    assert all(isinstance(image, GeneratedImage) for image in crowd.images.values())
    assert max(record.size_bytes for record in crowd.records if isinstance(record, LorasRecord)) <= max_bytes
