"""Times steps of 8 jobs with different LoRAs, compared with the same jobs without any, and with one step for each LoRA."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.contenders import InProcess
from benchmarks.loads import task
from benchmarks.setup import Setup
from stable_diffusion.core.types import LoraChoice
from stable_diffusion.engine.job import Job

if TYPE_CHECKING:
    from stable_diffusion.engine.denoiser import Denoiser
    from stable_diffusion.models.folder import ModelFolder

_JOBS = 8
_RANK = 4
_ROUNDS = 40
_MOST_STEPS = 150
# The LoRA of each job by its number; None: none.
_MIXES: dict[str, tuple[int | None, ...]] = {
    "none": (None,) * _JOBS,
    "none, after others had some": (None,) * _JOBS,
    "one LoRA for 2 of 8": (0, 0, *(None,) * 6),
    "one LoRA for all": (0,) * _JOBS,
    "4 LoRAs, 2 jobs each": (0, 0, 1, 1, 2, 2, 3, 3),
    "4 LoRAs, in 4 steps": (0, 0, 1, 1, 2, 2, 3, 3),
}
_IN_GROUPS = "4 LoRAs, in 4 steps"


@dataclass(frozen=True)
class LoraStepTime:
    """The jobs' next step: `times_none` compares its milliseconds with those of the same jobs without LoRAs."""

    mix: str
    step_ms: float
    times_none: float


def time_lora_steps(setup: Setup) -> Iterator[LoraStepTime]:
    """A row for each mix, from a process of its own."""
    process = InProcess("LoRA step times", lora_step_times, setup)
    yield from process.tell("time")
    process.end()


def lora_step_times(connection: Connection, setup: Setup) -> None:
    """Run the engine's arithmetic without its loop."""
    from stable_diffusion.engine.denoiser import Denoiser
    from stable_diffusion.engine.loading import load
    from stable_diffusion.models.folder import check_model

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as thread:
        model = replace(check_model(setup.model), loras=Path(folder))
        choices = thread.submit(_write_loras, model).result()
        denoiser = thread.submit(lambda: Denoiser(load(model, setup.precision))).result()
        connection.send("loaded")
        while connection.recv() is not None:
            connection.send(thread.submit(_time_mixes, denoiser, choices, setup.side).result())


def _write_loras(model: ModelFolder) -> list[LoraChoice]:
    """Four LoRAs of rank 4 with random values for every attention layer of the UNet."""
    import torch
    from safetensors.torch import save_file

    from stable_diffusion.models.loras import LoraFolder, model_layers

    layers = {name: shape for name, shape in model_layers(model)["unet"].items() if ".attn" in name}
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name, (out, width) in layers.items():
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(_RANK, width, generator=generator) * 0.05
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(out, _RANK, generator=generator) * 0.05
        save_file(tensors, model.loras / f"{number}.safetensors")
    files = LoraFolder(model.loras, model).look().files
    return [LoraChoice(name, 1.0, 1.0, file.hash, file.size_bytes) for name, file in sorted(files.items())]


def _time_mixes(denoiser: Denoiser, choices: Sequence[LoraChoice], side: int) -> list[LoraStepTime]:
    """In turn, so that a temporary slowdown of the machine affects all mixes."""
    batches = {
        mix: [_prepared(denoiser, choices, number, lora, side) for number, lora in enumerate(loras)] for mix, loras in _MIXES.items()
    }
    times: dict[str, list[float]] = {mix: [] for mix in _MIXES}
    for round_ in range(_ROUNDS + 1):
        for mix, batch in batches.items():
            calls = [batch[start : start + 2] for start in range(0, _JOBS, 2)] if mix == _IN_GROUPS else [batch]
            began_s = time.perf_counter()
            for jobs in calls:
                _step(denoiser, jobs)
            if round_:  # the first chooses kernels
                times[mix].append(time.perf_counter() - began_s)
    none = times["none"]
    return [
        LoraStepTime(
            mix,
            1000 * statistics.median(seconds),
            statistics.median(one / other for one, other in zip(seconds, none, strict=True)),
        )
        for mix, seconds in times.items()
    ]


def _step(denoiser: Denoiser, jobs: Sequence[Job]) -> None:
    import torch

    for job, predicted in zip(jobs, denoiser.predict(jobs), strict=True):
        denoiser.advance(job, predicted)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _prepared(denoiser: Denoiser, choices: Sequence[LoraChoice], number: int, lora: int | None, side: int) -> Job:
    chosen = () if lora is None else (choices[lora],)
    job = Job(replace(task(number, side, _MOST_STEPS), loras=chosen), on_end=lambda outcome: None)
    while not denoiser.can_prepare(job):
        time.sleep(0.001)
    job.tensors = denoiser.prepare(job.task, job.claim)
    return job
