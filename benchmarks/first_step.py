"""Checks and loads a model as a server does, and takes one step and decodes: seconds and peak memory of each part.

python -m benchmarks.first_step MODEL --precision fp16
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from benchmarks.loads import task
from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.job import Job
from stable_diffusion.engine.loading import load
from stable_diffusion.models.folder import check_model

Made = TypeVar("Made")


def _timed(part: str, work: Callable[[], Made]) -> Made:
    began_s = time.perf_counter()
    made = work()
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of this process so far; Linux counts in KiB
    print(f"{part}: {time.perf_counter() - began_s:.1f} s, peak {peak_gib:.1f} GiB", flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32")
    parser.add_argument("--side", type=int, help="pixels; by default the model's native size")
    arguments = parser.parse_args()
    model = _timed("check", lambda: check_model(arguments.model))
    parts = _timed("load", lambda: load(model, arguments.precision))
    denoiser = Denoiser(parts)
    job = Job(task(0, arguments.side or model.native_width, 1), on_end=lambda outcome: None)

    def prepare() -> None:
        job.tensors = denoiser.prepare(job.task)

    def step() -> None:
        denoiser.advance(job, denoiser.predict([job])[0])

    _timed("prepare", prepare)
    _timed("step", step)
    _timed("decode", lambda: denoiser.decode(job))


if __name__ == "__main__":
    main()
