"""A program that computes steps of the demo model for a while, next to another one, and prints their times in ms."""

from __future__ import annotations

import json
import sys
import time

from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.job import Job
from stable_diffusion.engine.loading import load
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from tests.tasks import make_task


def main() -> None:
    jobs, seconds = int(sys.argv[1]), float(sys.argv[2])
    denoiser = Denoiser(load(check_model(DEMO_FOLDER), "fp32"))
    batch = [Job(make_task(seed=number), on_end=lambda outcome: None) for number in range(jobs)]
    for job in batch:
        job.tensors = denoiser.prepare(job.task)
    for _ in range(10):  # like the start of an engine, which then knows how long a step takes
        denoiser.predict(batch)
    print("ready", flush=True)
    sys.stdin.readline()
    times_ms: list[float] = []
    end_s = time.perf_counter() + seconds
    while (began_s := time.perf_counter()) < end_s:
        denoiser.predict(batch)
        times_ms.append(1000 * (time.perf_counter() - began_s))
    print(json.dumps(times_ms))


if __name__ == "__main__":
    main()
