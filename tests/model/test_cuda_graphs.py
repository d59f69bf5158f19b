"""Recorded UNet calls, with a recorder for the CPU: what a CUDA graph does is run the same work again on the same memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from stable_diffusion.engine.cuda_graphs import RecordedCalls
from stable_diffusion.engine.denoiser import Denoiser
from stable_diffusion.engine.job import Job
from stable_diffusion.engine.loading import Parts
from stable_diffusion.engine.row_inputs import RowInputs
from stable_diffusion.engine.ways import Way
from tests.tasks import make_task

ROWS = 6


class Recorder:
    """Counts the replays."""

    def __init__(self) -> None:
        self.replays = 0

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        result = work()

        def replay() -> None:
            self.replays += 1
            result.copy_(work())

        return replay, result


def call(rows: RowInputs) -> torch.Tensor:
    """Each row's result depends on all of its inputs and on no other row's."""
    return rows.latents * rows.timesteps[:, None, None, None] + rows.embeddings.sum(dim=(1, 2))[:, None, None, None]


def inputs(rows: int, side: int = 8) -> RowInputs:
    return RowInputs(torch.randn(rows, 4, side, side), torch.arange(1.0, rows + 1), torch.randn(rows, 77, 16))


def recorded(recorder: Recorder) -> RecordedCalls:
    calls = RecordedCalls(call)
    calls.record(recorder.record, inputs(1), range(2, ROWS + 1, 2))
    return calls


@pytest.mark.parametrize("rows", range(1, ROWS + 1))
def test_a_replay_gives_what_the_call_gives_for_even_and_odd_numbers_of_rows(rows: int) -> None:
    recorder = Recorder()
    calls = recorded(recorder)
    with torch.inference_mode():
        calls(inputs(ROWS))  # leaves something in the memory
        given = inputs(rows)
        assert torch.equal(calls(given), call(given))
    assert recorder.replays == 2


@pytest.mark.parametrize(("rows", "side"), [(ROWS + 1, 8), (2, 9)])
def test_a_shape_that_was_not_recorded_is_computed_as_usual(rows: int, side: int) -> None:
    recorder = Recorder()
    given = inputs(rows, side)
    assert torch.equal(recorded(recorder)(given), call(given))
    assert recorder.replays == 0


def test_a_result_is_not_overwritten_by_the_next_call() -> None:
    calls = recorded(Recorder())
    with torch.inference_mode():
        first, second = inputs(2), inputs(2)
        result = calls(first)
        calls(second)
        assert torch.equal(result, call(first))


def test_recorded_steps_draw_the_same_picture(demo_parts: Parts) -> None:
    recorder = Recorder()
    plain, replayed = Denoiser(demo_parts), Denoiser(demo_parts, lambda: recorder.record)
    replayed.use(Way(graphs=True), 64, 64, [1, 2])
    jobs = [Job(make_task(guidance_end=0.5), on_end=lambda outcome: None) for _ in range(2)]
    latents = []
    for denoiser, job in zip((plain, replayed), jobs, strict=True):
        job.tensors = denoiser.prepare(job.task)
        while not job.is_denoised:
            denoiser.advance(job, denoiser.predict([job])[0])
        latents.append(job.tensors.latents)
    # On a CPU a replay is the same call: with two rows in the first half, with one in the second.
    assert torch.equal(latents[0], latents[1])
    assert recorder.replays == jobs[0].task.num_inference_steps + 1, "PNDM takes one step more"


def test_what_does_not_fit_into_memory_is_not_recorded_and_the_rest_is() -> None:
    recorder = Recorder()

    def record(work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        replay, result = recorder.record(work)
        if len(result) > 4:
            raise torch.OutOfMemoryError("no room, on purpose")
        return replay, result

    calls = RecordedCalls(call)
    assert calls.record(record, inputs(1), range(2, ROWS + 1, 2)) == 4
    with torch.inference_mode():
        for rows in (4, 6):
            given = inputs(rows)
            assert torch.equal(calls(given), call(given))
    assert recorder.replays == 1
