"""Times UNet calls in every way of computing by the number of jobs, with and without a LoRA, and compares the results with eager's.

Also times the work around the steps of one image: encoding the text, decoding the latents. The table is for people; no code reads it.
"""

from __future__ import annotations

import argparse
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
from stable_diffusion.engine.adapters import LowRank
from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.loading import load
from stable_diffusion.engine.ways import EAGER, Way, ways_to_try
from stable_diffusion.models.folder import check_model

_ROUNDS = 15
_RANK = 8


@dataclass(frozen=True)
class Timed:
    """`difference`: the norm of the difference from eager's result, divided by the norm of eager's result. `computed`: the way in which
    the call was computed in the end."""

    way: str
    rows: str
    jobs: int
    unet_ms: float
    difference: float
    computed: str


@dataclass(frozen=True)
class Around:
    what: str
    images: int
    ms: float


class Ways:
    """One model; the ways change it and restore it."""

    def __init__(self, folder: Path, precision: Any, side: int, jobs: Sequence[int]) -> None:
        self._side = side
        self._jobs = jobs
        self._parts = load(check_model(folder), precision)
        self._denoiser = Denoiser(self._parts)
        plain = {count: self._denoiser.sample_inputs(count, side, side) for count in jobs}
        lora = (self._random_lora(), 1.0)
        with_lora = {count: replace(given, adapters=((lora,),) * given.rows) for count, given in plain.items()}
        self.inputs = {"plain": plain, "LoRA": with_lora}
        self._expected = {rows: {count: self._denoiser.compute(one) for count, one in given.items()} for rows, given in self.inputs.items()}
        self.device = self._parts.device.type

    def _random_lora(self) -> dict[str, LowRank]:
        """A LoRA of rank 8 for every attention layer."""
        lora = {}
        for name, layer in self._parts.unet.named_modules():
            if ".attn" in name and isinstance(layer, torch.nn.Linear):
                shapes = (_RANK, layer.in_features), (layer.out_features, _RANK)
                down, up = (0.01 * torch.randn(shape, device=self._parts.device, dtype=self._parts.dtype) for shape in shapes)
                lora[name] = LowRank(down, up, float(_RANK))
        return lora

    def enter(self, way: Way) -> None:
        self._denoiser.use(way, self._side, self._side, self._jobs)

    @torch.inference_mode()
    def time(self, way: Way, rows: str, jobs: int) -> Timed:
        given, expected = self.inputs[rows][jobs], self._expected[rows][jobs].float()
        result = self._denoiser.compute(given).float()
        difference = float((result - expected).norm() / expected.norm())
        return Timed(way.name, rows, jobs, 1000 * _spent(lambda: self._denoiser.compute(given)), difference, self._denoiser.execution)

    @torch.inference_mode()
    def around(self) -> list[Around]:
        """The cost of a job besides its steps, and of decoding several at once."""
        parts = self._parts
        numbers = iter(range(10**6))
        vae: Any = parts.vae
        shape = (1, vae.config.latent_channels, self._side // 8, self._side // 8)
        found = [
            Around("encode text, draw noise", 1, 1000 * _spent(lambda: self._denoiser.prepare(self._new_task(next(numbers))))),
        ]
        for count in (1, 4):
            latents = torch.randn(shape, device=parts.device, dtype=vae.dtype).repeat(count, 1, 1, 1)

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
    heads = ["UNet call, ms, by jobs with guidance", "rows", *map(str, jobs), "difference", "computed"]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for way, rows in dict.fromkeys((one.way, one.rows) for one in timed):
        of_way = {one.jobs: one for one in timed if (one.way, one.rows) == (way, rows)}
        cells = [f"{of_way[count].unet_ms:.1f}" if count in of_way else "" for count in jobs]
        computed = ", ".join(dict.fromkeys(one.computed for one in of_way.values()))
        difference = f"{max(one.difference for one in of_way.values()):.1e}"
        lines.append(f"| {' | '.join([way, rows, *cells, difference, computed])} |")
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
    parser.add_argument("--compile", action="store_true", help="only eager and the ways that compile, which take minutes")
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

    if not arguments.compile:
        around += ways.around()
    wanted = [EAGER, *(way for way in ways_to_try(ways.device) if way.compiled == arguments.compile)]
    for way in wanted:
        try:
            ways.enter(way)
            for rows in ways.inputs:
                for count in arguments.jobs:
                    timed.append(ways.time(way, rows, count))
                    save()
        except Exception as error:
            failed[way.name] = f"{type(error).__name__}: {error}"[:500]
            save()
    ways.enter(EAGER)
    after = ways.time(EAGER, "plain", arguments.jobs[0])
    timed.append(replace(after, way="eager, after all others"))
    save()


if __name__ == "__main__":
    main()
