"""What a step costs: with more and more jobs in it, beside the UNet call alone, beside the device's matrix product."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from tqdm import tqdm

from benchmarks.contenders import MAX_BATCH_SIZE, InProcess
from benchmarks.loads import task
from benchmarks.setup import Setup
from stable_diffusion.engine.job import Job

if TYPE_CHECKING:
    from stable_diffusion.engine.denoiser import Denoiser

_MOST_STEPS = 150
# Of a square matrix that keeps the device busy for long enough to be measured.
_MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class StepTime:
    """A step with guidance of so many jobs."""

    jobs: int
    step_ms: float
    unet_ms: float  # the UNet call in it alone
    tflop: float  # of that call, counted
    matrix_product_tflops: float  # what the device does per second in a matrix product of the same dtype

    @property
    def between_calls(self) -> float:
        """The share of the step that is not the UNet."""
        return (self.step_ms - self.unet_ms) / self.step_ms

    @property
    def share_of_matrix_product(self) -> float:
        return self.tflop / (self.unet_ms / 1000) / self.matrix_product_tflops


def time_steps(setup: Setup, jobs: Sequence[int]) -> Iterator[StepTime]:
    """One after the other, until so many do not fit into memory."""
    process = InProcess("step times", step_times, setup)
    for count in tqdm(jobs, desc="step times", unit="size"):
        step_time: StepTime | None = process.tell(count)
        if step_time is None:
            break
        yield step_time
    process.end()


def step_times(connection: Connection, setup: Setup) -> None:
    """The engine's arithmetic without its loop. Runs in a process of its own."""
    from stable_diffusion.engine.cuda_graphs import CudaGraphs
    from stable_diffusion.engine.denoiser import Denoiser
    from stable_diffusion.engine.loading import load
    from stable_diffusion.models.folder import check_model

    # One thread from loading on: a second one that used OpenMP would slow it down on a CPU.
    with ThreadPoolExecutor(1) as thread:
        denoiser = thread.submit(lambda: Denoiser(load(check_model(setup.model), setup.precision))).result()
        # Before anything is recorded: a replay computes what nobody can count.
        tflop = thread.submit(count_tflop, denoiser, setup.side).result()
        if setup.cuda_graphs:
            thread.submit(lambda: denoiser.record_steps(CudaGraphs(), setup.side, setup.side, MAX_BATCH_SIZE)).result()
        connection.send("loaded")
        while (jobs := connection.recv()) is not None:
            connection.send(thread.submit(time_step, denoiser, jobs, setup.side, tflop).result())


def time_step(denoiser: Denoiser, jobs: int, side: int, tflop: float) -> StepTime | None:
    """`tflop`: of one job's call."""
    import torch

    def step() -> None:
        for job, predicted in zip(batch, denoiser.predict(batch), strict=True):
            denoiser.advance(job, predicted)

    try:
        batch = [Job(task(number, side, _MOST_STEPS), on_end=lambda outcome: None) for number in range(jobs)]
        for job in batch:
            job.tensors = denoiser.prepare(job.task)
        call = partial(denoiser.call_unet, denoiser.unet_inputs(batch))
        rounds = 3 if _seconds(step) > 1 else 25
        assert batch[0].tensors is not None
        latents = batch[0].tensors.latents
        matrix = torch.randn((_MATRIX_SIDE[latents.device.type],) * 2, device=latents.device, dtype=latents.dtype)
        product = partial(torch.matmul, matrix, matrix)
        product()
        # In turn, so that what slows the machine down for a while slows all.
        times = [(_seconds(step), _seconds(call), _seconds(product)) for _ in range(rounds)]
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    step_s, unet_s, product_s = (statistics.median(column) for column in zip(*times, strict=True))
    return StepTime(jobs, 1000 * step_s, 1000 * unet_s, jobs * tflop, 2 * len(matrix) ** 3 / 1e12 / product_s)


def _seconds(work: Callable[[], object]) -> float:
    import torch

    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def count_tflop(denoiser: Denoiser, side: int) -> float:
    """Of the UNet call of one job with guidance."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    job = Job(task(0, side, 2), on_end=lambda outcome: None)
    job.tensors = denoiser.prepare(job.task)
    # The counter does not know the CPU's fused attention, so that one is taken apart.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        denoiser.predict([job])
    total: int = counter.get_total_flops()
    return total / 1e12
