"""The engine on this machine's device against diffusers' own pipelines, against the CPU, in batches, and with too little memory.

Every check uses the real engine; only the weights of the full-size model are random.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import diffusers
import numpy as np
import torch
from PIL import Image

from benchmarks import loads
from benchmarks.gpu.checks import Checks, Finding
from benchmarks.plain import Plain
from benchmarks.report import machine
from benchmarks.setup import Setup
from stable_diffusion.core.schedulers import SCHEDULERS
from stable_diffusion.core.telemetry import BatchLimitRecord, OutOfMemoryRecord, Record
from stable_diffusion.core.types import GeneratedImage, Kind, Precision, Task
from stable_diffusion.engine.adapters import LowRank
from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.engine import Engine
from stable_diffusion.engine.loading import Parts, load
from stable_diffusion.engine.ways import EAGER, Way, obstacle, tolerance, ways_to_try
from stable_diffusion.models.folder import check_model
from tests.model.recording_engine import RecordingEngine
from tests.safety_checkers import make_checked_model

STEPS = 4
NO_GPU = Finding(None, "needs a GPU")
# Levels of 255. Generated alone, an image must equal diffusers' on the same device. Another batch size, a replayed graph or a CPU may
# round differently; in half precision a few pixels near edges then differ by more, so there the mean is limited.
MEAN_TOLERANCE = {"fp32": 0.5, "fp16": 2.0}


class Running:
    """An engine and its records."""

    def __init__(self, parts: Parts, max_batch_size: int = 10, denoiser: Denoiser | None = None) -> None:
        self.records: list[Record] = []
        engine = Engine(lambda: denoiser or Denoiser(parts), max_batch_size, on_record=self.records.append)
        self._recording = RecordingEngine(engine, [])

    def generate(self, tasks: Sequence[Task]) -> list[GeneratedImage]:
        """All tasks at once. Raises the first error."""
        return self._recording.draw(tasks)

    def close(self) -> None:
        self._recording.engine.close()


def differences(one: Image.Image, other: Image.Image) -> np.ndarray[Any, Any]:
    """The difference of each value, in levels of 255."""
    found: np.ndarray[Any, Any] = np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int))
    return found


class NoiseOf(Denoiser):
    """Draws noise in another dtype than it computes in: before torch 2.12, half precision had other random numbers."""

    def __init__(self, parts: Parts, dtype: torch.dtype) -> None:
        super().__init__(parts)
        self._noise_dtype = dtype

    def _draw_noise(self, task: Task, generator: torch.Generator) -> torch.Tensor:
        shape = super()._draw_noise(task, torch.Generator("cpu")).shape
        return torch.randn(shape, generator=generator, dtype=self._noise_dtype).to(self._parts.dtype)


class Proof:
    """Shared by the checks: the model on the device, the engine, and diffusers' pipelines with the same weights."""

    def __init__(self, folder: Path, precision: Precision, side: int) -> None:
        self._folder = folder
        self._precision = precision
        self._side = side
        self._parts = load(check_model(folder), precision)
        self._on_gpu = self._parts.device.type == "cuda"
        self._running = Running(self._parts)
        self._plain = None if self._parts.is_xl else Plain(Setup(folder, precision, side), self._parts)

    def close(self) -> None:
        self._running.close()

    def _task(self, number: int, **changes: Any) -> Task:
        kind = changes.pop("kind", "txt2img")
        return replace(loads.task(number, self._side, STEPS, kind=kind), negative_prompt="green", **changes)

    def like_diffusers(self, kind: Kind) -> Finding:
        """Each noise scheduler: the engine's only job against diffusers' pipeline."""
        if self._plain is None:
            return Finding(None, "the comparison has no pipelines of Stable Diffusion XL")
        largest: dict[str, int] = {}
        for number, scheduler in enumerate(SCHEDULERS):
            task = self._task(number, kind=kind, scheduler=scheduler)
            (ours,) = self._running.generate([task])
            largest[scheduler] = int(differences(ours.image, self._plain.generate_with(scheduler, task)).max())
        unequal = ", ".join(f"{name.removesuffix('Scheduler')} {levels}" for name, levels in largest.items() if levels)
        detail = f"differ, in levels of 255: {unequal}" if unequal else f"{len(largest)} noise schedulers, every value equal"
        return Finding(not unequal, detail)

    def in_a_batch(self) -> Finding:
        """Ten jobs of all kinds, lengths and noise schedulers at once against each of them alone."""
        names = list(SCHEDULERS)
        tasks = [
            self._task(
                number,
                kind=loads.KINDS[number % 3],
                scheduler=names[number % len(names)],
                guidance_scale=1.0 if number % 4 == 3 else 7.5,
                num_inference_steps=STEPS + number % 3,
            )
            for number in range(10)
        ]
        alone = [self._running.generate([task])[0].image for task in tasks]
        together = [image.image for image in self._running.generate(tasks)]
        return self._compared([differences(one, other) for one, other in zip(alone, together, strict=True)])

    def like_the_cpu(self) -> Finding:
        """The same weights in float32 on the CPU. A large model generates small images, or it would take minutes."""
        if not self._on_gpu:
            return NO_GPU
        cpu = torch.device("cpu")
        parts = replace(
            self._parts,
            unet=copy.deepcopy(self._parts.unet).to(cpu, torch.float32),
            vae=copy.deepcopy(self._parts.vae).to(cpu, torch.float32),
            text_encoders=tuple(
                replace(encoder, model=copy.deepcopy(encoder.model).to(cpu, torch.float32)) for encoder in self._parts.text_encoders
            ),
            safety_checker=None,
            device=cpu,
            dtype=torch.float32,
        )
        side = min(self._side, 256)
        count = 6 if side < 256 else 1
        # A scheduler that adds noise in its steps draws it in the dtype that it computes in.
        names = [name for name in SCHEDULERS if "Ancestral" not in name]
        tasks = [replace(self._task(number), width=side, height=side, scheduler=names[number]) for number in range(count)]
        on_cpu = Running(parts, denoiser=NoiseOf(parts, self._parts.dtype))
        theirs = [on_cpu.generate([task])[0].image for task in tasks]
        on_cpu.close()
        ours = [self._running.generate([task])[0].image for task in tasks]
        return self._compared([differences(one, other) for one, other in zip(ours, theirs, strict=True)])

    def like_eager(self, way: Way) -> Finding:
        """UNet calls of 1 to 4 jobs, without and with LoRA rows, and an image: in this way and eagerly; then eagerly again."""
        if problem := obstacle(way, self._parts.device.type):
            return Finding(None, problem)
        denoiser = Denoiser(self._parts)
        inputs = {count: denoiser.sample_inputs(count, self._side, self._side) for count in (1, 2, 3, 4)}
        lora = (self._random_lora(), 1.0)
        inputs |= {10 * count: replace(one, adapters=((lora,), *((),) * (one.rows - 1))) for count, one in inputs.items()}
        expected = {count: denoiser.compute(one) for count, one in inputs.items()}
        (usual,) = self._running.generate([self._task(0)])
        denoiser.use(way, self._side, self._side, (1, 2, 3, 4))
        differs, computed = 0.0, []
        for count in (1, 10, 2, 20, 3, 30, 4, 40, 1):
            difference = denoiser.compute(inputs[count]).float() - expected[count].float()
            differs = max(differs, float(difference.norm() / expected[count].float().norm()))
            computed.append(denoiser.execution)
        running = Running(self._parts, denoiser=denoiser)
        image = differences(running.generate([self._task(0)])[0].image, usual.image)
        running.close()
        denoiser.use(EAGER, self._side, self._side, (1,))
        restored = all(torch.equal(denoiser.compute(inputs[count]), expected[count]) for count in (1, 10, 4))
        allowed = tolerance(self._parts.device.type, str(self._parts.dtype)) or 1e-5  # a CPU is held to less only at a start
        finding = self._compared([image])
        kinds = ", ".join(dict.fromkeys(computed))
        detail = f"UNet outputs differ by {differs:.1e} of {allowed:.0e}; computed: {kinds}; eager again equal: {restored}; the image: "
        return Finding(bool(finding.passed) and differs <= allowed and restored, detail + finding.detail)

    def _random_lora(self) -> dict[str, LowRank]:
        """A LoRA of rank 4 for every attention layer."""
        lora = {}
        for name, layer in self._parts.unet.named_modules():
            if ".attn" in name and isinstance(layer, torch.nn.Linear):
                shapes = (4, layer.in_features), (layer.out_features, 4)
                down, up = (0.05 * torch.randn(shape, device=self._parts.device, dtype=self._parts.dtype) for shape in shapes)
                lora[name] = LowRank(down, up, 4.0)
        return lora

    def decoded_together(self) -> Finding:
        """Four images decoded in one call against each alone."""
        vae: Any = self._parts.vae
        side = self._side // 2 ** (len(vae.config.block_out_channels) - 1)
        with torch.inference_mode():
            latents = torch.randn(4, vae.config.latent_channels, side, side, device=self._parts.device).to(vae.dtype)
            together = vae.decode(latents, return_dict=False)[0].float()
            alone = torch.cat([vae.decode(one[None], return_dict=False)[0] for one in latents]).float()
        levels = float((together - alone).abs().max()) * 127.5
        return Finding(levels <= 3, f"differ by at most {levels:.2f} of 255 levels; allowed are 3")

    def survives_an_overflowing_decoder(self) -> Finding:
        """A decoder whose values exceed float16's range without changing the image: normalisation cancels the last block's scale."""
        if self._parts.dtype != torch.float16:
            return Finding(None, "needs a GPU and half precision")
        vae = copy.deepcopy(self._parts.vae)
        with torch.no_grad():
            for block in cast(Any, vae).decoder.up_blocks[-1].resnets:
                for convolution in filter(None, (block.conv2, block.conv_shortcut)):
                    convolution.weight.mul_(2.0**14)
                    convolution.bias.mul_(2.0**14)
        running = Running(replace(self._parts, vae=vae))
        (spoiled,) = running.generate([self._task(0)])
        running.close()
        (usual,) = self._running.generate([self._task(0)])
        finding = self._compared([differences(spoiled.image, usual.image)])
        detail = f"decoded again: {spoiled.decoded_again}; against the undamaged decoder: {finding.detail}"
        return Finding(bool(finding.passed) and spoiled.decoded_again and not usual.decoded_again, detail)

    def safety_checker(self) -> Finding:
        """A checker that flags everything blanks the image; one that flags nothing leaves it unchanged."""
        flagged: dict[bool, GeneratedImage] = {}
        for flags_everything in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                model = make_checked_model(Path(folder) / "checked", flags_everything=flags_everything)
                running = Running(load(check_model(model), self._precision))
            (flagged[flags_everything],) = running.generate([replace(loads.task(0, 64, STEPS), safety_check=True)])
            running.close()
        blank = not np.asarray(flagged[True].image).any()
        passed = blank and flagged[True].flagged is True and flagged[False].flagged is False and np.asarray(flagged[False].image).any()
        return Finding(bool(passed), f"computed in {flagged[True].dtype}; flagged: blank is {blank}")

    def runs_out_of_memory(self) -> Finding:
        """With memory for only one job of 1024 pixels, 24 such jobs are submitted; then one of the usual size."""
        if not self._on_gpu:
            return NO_GPU
        tasks = [loads.task(number, 1024, 2) for number in range(24)]
        total = torch.cuda.get_device_properties(0).total_memory
        running = Running(self._parts, max_batch_size=len(tasks))
        (usual,) = self._running.generate([self._task(0)])
        _forget_memory()
        running.generate(tasks[:1])
        for_one = torch.cuda.max_memory_reserved()
        _forget_memory()
        torch.cuda.set_per_process_memory_fraction(min(1.0, for_one * 1.03 / total))
        try:
            running.records.clear()
            images = running.generate(tasks)
            ran_out = sum(isinstance(record, OutOfMemoryRecord) for record in running.records)
            limits = [record.jobs for record in running.records if isinstance(record, BatchLimitRecord)]
            (following,) = running.generate([self._task(0)])
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            running.close()
            _forget_memory()
        equal = not differences(following.image, usual.image).any()
        detail = (
            f"{for_one / 2**30:.1f} GiB allowed; ran out {ran_out} times with {len(tasks)} jobs, at most {limits} in a step afterwards, "
            f"{len(images)} of {len(tasks)} images generated; the next image equal: {equal}"
        )
        return Finding(ran_out > 0 and bool(limits) and len(images) == len(tasks) and equal, detail)

    def _compared(self, found: Sequence[np.ndarray[Any, Any]]) -> Finding:
        everything = np.concatenate([one.ravel() for one in found])
        mean = float(everything.mean())
        detail = (
            f"{len(found)} images: mean {mean:.3f} levels, 99.9 % of the values within {np.percentile(everything, 99.9):.0f}, "
            f"largest {everything.max()}; allowed is a mean of {MEAN_TOLERANCE[self._precision]}"
        )
        return Finding(mean <= MEAN_TOLERANCE[self._precision], detail)


def _forget_memory() -> None:
    """Release cached memory and reset the peak counter."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


CHECKS: dict[str, Callable[[Proof], Finding]] = {
    **{f"{kind} equals diffusers": partial(Proof.like_diffusers, kind=kind) for kind in loads.KINDS},
    "in a batch as alone": Proof.in_a_batch,
    **{f"{way.name} as eager": partial(Proof.like_eager, way=way) for way in ways_to_try("cuda") if not way.compiled},
    "decoded together as alone": Proof.decoded_together,
    "as on the CPU": Proof.like_the_cpu,
    "a decoder that overflows": Proof.survives_an_overflowing_decoder,
    "safety checker": Proof.safety_checker,
    "out of memory": Proof.runs_out_of_memory,
}


def prove(checks: Checks, folder: Path, precision: Precision, side: int, wanted: Sequence[str]) -> None:
    proof = Proof(folder, precision, side)
    for name in wanted:
        checks.make(f"{precision}: {name}", partial(CHECKS[name], proof))
    proof.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a diffusers folder")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "fp16"), default=["fp16", "fp32"])
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--side", type=int, required=True, help="pixels")
    parser.add_argument("--name", required=True, help="name of the output files")
    parser.add_argument("--output", type=Path, required=True, help="an existing folder")
    arguments = parser.parse_args()
    about = {**machine(), "diffusers": diffusers.__version__, "model": arguments.model.name, "side": str(arguments.side)}
    checks = Checks(arguments.output, arguments.name, about)
    for precision in arguments.precisions:
        prove(checks, arguments.model.resolve(), precision, arguments.side, arguments.checks)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
