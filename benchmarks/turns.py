"""Processor time of a step of ten jobs without the UNet call, by noise scheduler: what a GPU may wait for between two UNet calls.

On the demo model and one thread. `python -m benchmarks.turns` prints a table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from benchmarks.loads import task
from stable_diffusion.core.schedulers import SCHEDULERS
from stable_diffusion.engine.copies import AsynchronousCopies
from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.job import Job
from stable_diffusion.engine.loading import load
from stable_diffusion.models.folder import DEMO_FOLDER, check_model

_JOBS = 10
_STEPS = 40


def turn_ms(denoiser: Denoiser, scheduler: str) -> float:
    """Median milliseconds of the processor for the inputs of a step and for its end. The UNet's result is zeros."""
    jobs = [Job(replace(task(number, 64, _STEPS), scheduler=scheduler), on_end=lambda outcome: None) for number in range(_JOBS)]
    for job in jobs:
        job.tensors = denoiser.prepare(job.task)
    predicted = torch.zeros(2, 4, 8, 8)
    times: list[float] = []
    while not jobs[0].is_denoised:
        began_s = time.thread_time()
        denoiser.unet_inputs(jobs)
        for job in jobs:
            denoiser.advance(job, predicted)
        times.append(time.thread_time() - began_s)
    return 1000 * statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    denoiser = Denoiser(load(check_model(DEMO_FOLDER), "fp32"))
    print("| noise scheduler | ms | as on a GPU, where copies are noticed |\n|---|---|---|")
    on_gpu: Callable[[], AbstractContextManager[object]] = AsynchronousCopies
    for scheduler in SCHEDULERS:
        found: list[float] = []
        for copies in (nullcontext, on_gpu):
            denoiser.copies = copies
            found.append(turn_ms(denoiser, scheduler))
        print(f"| {scheduler} | {found[0]:.1f} | {found[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
