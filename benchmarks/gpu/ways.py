"""Compares ways of computing a UNet call with eager mode: the time by rows, and the difference of the result.

Also times the work around the steps of one image: encoding the text, decoding the latents. The table is for people; no code reads it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import loads
from benchmarks.report import machine
from stable_diffusion.engine.cuda_graphs import CudaGraphs
from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.job import Job
from stable_diffusion.engine.loading import Parts, load
from stable_diffusion.engine.row_inputs import RowInputs
from stable_diffusion.models.folder import check_model

_ROUNDS = 15


@dataclass(frozen=True)
class Timed:
    """`difference`: the norm of the difference from eager's result, divided by the norm of eager's result."""

    way: str
    jobs: int
    unet_ms: float
    difference: float


@dataclass(frozen=True)
class Around:
    what: str
    images: int
    ms: float


class Ways:
    def __init__(self, folder: Path, precision: Any, side: int, jobs: Sequence[int]) -> None:
        self._side = side
        self._jobs = jobs
        self._parts = load(check_model(folder), precision)
        self._eager = Denoiser(self._parts)
        self._inputs = {count: self._inputs_of(count) for count in jobs}
        self._expected = {count: self._eager.call_unet(given) for count, given in self._inputs.items()}
        self.on_gpu = self._parts.device.type == "cuda"

    @torch.inference_mode()
    def _inputs_of(self, count: int) -> RowInputs:
        jobs = [Job(loads.task(number, self._side, 20), on_end=lambda outcome: None) for number in range(count)]
        for job in jobs:
            job.tensors = self._eager.prepare(job.task)
        return self._eager.unet_inputs(jobs)

    def eager(self) -> Denoiser:
        return self._eager

    def graphs(self) -> Denoiser:
        return self._recorded(Denoiser(self._parts))

    def channels_last(self) -> Denoiser:
        return Denoiser(self._channels_last_parts())

    def channels_last_graphs(self) -> Denoiser:
        return self._recorded(self.channels_last())

    def compiled(self) -> Denoiser:
        parts = self._channels_last_parts()
        # After the second, every number of rows would be compiled again, which takes a minute each.
        unet: Any = torch.compile(parts.unet, dynamic=False)
        return Denoiser(replace(parts, unet=unet))

    def compiled_graphs(self) -> Denoiser:
        return self._recorded(self.compiled())

    def _channels_last_parts(self) -> Parts:
        unet: Any = copy.deepcopy(self._parts.unet)
        return replace(self._parts, unet=unet.to(memory_format=torch.channels_last))

    def _recorded(self, denoiser: Denoiser) -> Denoiser:
        row = self._inputs[self._jobs[0]].first()
        denoiser.call_unet.record(CudaGraphs(), row, [2 * count for count in self._jobs])
        return denoiser

    @torch.inference_mode()
    def time(self, way: str, denoiser: Denoiser, jobs: int) -> Timed:
        given, expected = self._inputs[jobs], self._expected[jobs].float()
        result = denoiser.call_unet(given).float()
        difference = float((result - expected).norm() / expected.norm())
        spent = _spent(lambda: denoiser.call_unet(given))
        return Timed(way, jobs, 1000 * spent, difference)

    @torch.inference_mode()
    def around(self) -> list[Around]:
        """The cost of a job besides its steps, and of decoding several at once."""
        parts = self._parts
        numbers = iter(range(10**6))
        vae: Any = parts.vae
        shape = (1, vae.config.latent_channels, self._side // 8, self._side // 8)
        found = [
            Around("encode text, draw noise", 1, 1000 * _spent(lambda: self._eager.prepare(self._new_task(next(numbers))))),
        ]
        for count in (1, 4):
            latents = torch.randn(shape, device=parts.device, dtype=parts.dtype).repeat(count, 1, 1, 1)

            def decode(latents: torch.Tensor = latents) -> None:
                vae.decode(latents, return_dict=False)

            found.append(Around("decoded by the VAE", count, 1000 * _spent(decode)))
        pixels = torch.rand(1, 3, self._side, self._side, device=parts.device)
        found.append(Around("pixels to the CPU", 1, 1000 * _spent(lambda: (pixels * 255).to(torch.uint8).cpu())))
        return found

    def _new_task(self, number: int) -> Any:
        """A task with a new prompt, so that the text must be encoded."""
        return replace(loads.task(number, self._side, 20), prompt=f"image {number}")


def _spent(work: Callable[[], object]) -> float:
    """Median seconds of several calls, after two warm-up calls."""
    times: list[float] = []
    for _ in range(_ROUNDS + 2):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def markdown(about: dict[str, str], timed: list[Timed], around: list[Around], failed: dict[str, str]) -> str:
    jobs = sorted({one.jobs for one in timed})
    lines = [", ".join(f"{name}: {value}" for name, value in about.items()), ""]
    lines += [f"| UNet call, ms, by jobs with guidance | {' | '.join(map(str, jobs))} | difference |", "|---" * (len(jobs) + 2) + "|"]
    for way in dict.fromkeys(one.way for one in timed):
        of_way = {one.jobs: one for one in timed if one.way == way}
        cells = [f"{of_way[count].unet_ms:.1f}" if count in of_way else "" for count in jobs]
        lines.append(f"| {way} | {' | '.join(cells)} | {max(one.difference for one in of_way.values()):.1e} |")
    lines += ["", "| beside the steps | images | ms |", "|---|---|---|"]
    lines += [f"| {one.what} | {one.images} | {one.ms:.1f} |" for one in around]
    lines += [f"\n{way}: {reason}" for way, reason in failed.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a diffusers folder")
    parser.add_argument("--precision", choices=("fp32", "fp16"), required=True)
    parser.add_argument("--side", type=int, required=True, help="pixels")
    parser.add_argument(
        "--jobs", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="numbers of jobs that share a call, each with guidance"
    )
    parser.add_argument("--compile", action="store_true", help="include the ways that compile, which take minutes")
    parser.add_argument("--name", required=True, help="name of the output files")
    parser.add_argument("--output", type=Path, required=True, help="an existing folder")
    arguments = parser.parse_args()
    about = {**machine(), "model": arguments.model.name, "side": str(arguments.side), "precision": arguments.precision}
    ways = Ways(arguments.model.resolve(), arguments.precision, arguments.side, arguments.jobs)
    timed: list[Timed] = []
    around: list[Around] = []
    failed: dict[str, str] = {}

    def save() -> None:
        content = {"about": about, "ways": [asdict(one) for one in timed], "around": [asdict(one) for one in around], "failed": failed}
        (arguments.output / f"{arguments.name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        (arguments.output / f"{arguments.name}.md").write_text(markdown(about, timed, around, failed), encoding="utf-8")

    around += ways.around()
    wanted: dict[str, Callable[[], Denoiser]] = {"eager": ways.eager, "channels_last": ways.channels_last}
    if ways.on_gpu:
        wanted |= {"graphs": ways.graphs, "channels_last, graphs": ways.channels_last_graphs}
    if arguments.compile:
        wanted |= {"compiled": ways.compiled} if not ways.on_gpu else {"compiled, graphs": ways.compiled_graphs}
    for name, make in wanted.items():
        try:
            denoiser = make()
            for count in arguments.jobs:
                timed.append(ways.time(name, denoiser, count))
                save()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:500]
            save()
    save()


if __name__ == "__main__":
    main()
