"""Times steps with increasing numbers of jobs, compared with the UNet call alone and with the device's matrix product."""

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
# Size of a square matrix whose product takes long enough to be measured.
_MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class StepTime:
    """A step of `jobs` jobs with guidance."""

    jobs: int
    step_ms: float
    unet_ms: float  # of its UNet call alone
    tflop: float  # of that call, counted
    matrix_product_tflops: float  # the device's rate in a matrix product of the same dtype

    @property
    def between_calls(self) -> float:
        """The share of the step that is not the UNet."""
        return (self.step_ms - self.unet_ms) / self.step_ms

    @property
    def share_of_matrix_product(self) -> float:
        return self.tflop / (self.unet_ms / 1000) / self.matrix_product_tflops


def time_steps(setup: Setup, jobs: Sequence[int]) -> Iterator[StepTime]:
    """Time steps with each number of jobs, until they do not fit into memory."""
    process = InProcess("step times", step_times, setup)
    for count in tqdm(jobs, desc="step times", unit="size"):
        step_time: StepTime | None = process.tell(count)
        if step_time is None:
            break
        yield step_time
    process.end()


def step_times(connection: Connection, setup: Setup) -> None:
    """Run the engine's arithmetic without its loop, in a process of its own."""
    from stable_diffusion.engine.denoiser import Denoiser
    from stable_diffusion.engine.loading import load
    from stable_diffusion.engine.ways import way_named
    from stable_diffusion.models.folder import check_model

    # Everything on one thread: a second one that used OpenMP would slow it down on a CPU.
    with ThreadPoolExecutor(1) as thread:
        denoiser = thread.submit(lambda: Denoiser(load(check_model(setup.model), setup.precision))).result()
        # Before any CUDA graph is recorded: the counter cannot see into a replay.
        tflop = thread.submit(count_tflop, denoiser, setup.side).result()
        jobs = range(1, MAX_BATCH_SIZE + 1)
        thread.submit(lambda: denoiser.use(way_named(setup.execution), setup.side, setup.side, jobs)).result()
        connection.send("loaded")
        while (count := connection.recv()) is not None:
            connection.send(thread.submit(time_step, denoiser, count, setup.side, tflop).result())


def time_step(denoiser: Denoiser, jobs: int, side: int, tflop: float) -> StepTime | None:
    """`tflop`: for the UNet call of one job."""
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
        # In turn, so that a temporary slowdown of the machine affects all.
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
    """The arithmetic of the UNet call of one job with guidance, in TFLOP."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    job = Job(task(0, side, 2), on_end=lambda outcome: None)
    job.tensors = denoiser.prepare(job.task)
    # The counter does not know the CPU's fused attention, so use the unfused one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        denoiser.predict([job])
    total: int = counter.get_total_flops()
    return total / 1e12
