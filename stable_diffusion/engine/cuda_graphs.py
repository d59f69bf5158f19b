"""UNet calls that are recorded once per number of rows and then replayed: one launch instead of a thousand.

A call with an unrecorded shape runs as usual. `RecordedCalls` does not depend on jobs or on how a device records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from stable_diffusion.engine.row_inputs import RowInputs

UNetCall = Callable[[RowInputs], torch.Tensor]
# Runs the work at least once. Returns how to run it again on the same memory, and where its result then lies.
Recorder = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], None], torch.Tensor]]


@dataclass(frozen=True)
class _Recording:
    inputs: RowInputs
    replay: Callable[[], None]
    result: torch.Tensor


class RecordedCalls:
    """A UNet call, replayed if its shape was recorded. Rows with adapters are never recorded: each mix would be a call of its own."""

    def __init__(self, call: UNetCall) -> None:
        self._call = call
        self._recordings: dict[tuple[object, ...], _Recording] = {}
        self.was_replayed = False  # the last call

    @torch.inference_mode()
    def record(self, record: Recorder, row: RowInputs, rows: Sequence[int]) -> int:
        """Record calls with each number of `rows`, made of the single row `row`. Returns the most rows that fitted into memory, or 0.

        The largest is recorded first, so that the others can reuse its memory.
        """
        most = 0
        for count in sorted(rows, reverse=True):
            inputs = row.repeated(count)
            try:
                replay, result = record(partial(self._call, inputs))
            except torch.OutOfMemoryError:
                continue
            most = max(most, count)
            self._recordings[_key(count, inputs)] = _Recording(inputs, replay, result)
        return most

    def forget(self) -> None:
        """Drop all recordings, and the memory that they hold."""
        self._recordings.clear()

    def __call__(self, inputs: RowInputs) -> torch.Tensor:
        rows = inputs.rows
        recording = self._recordings.get(_key(rows, inputs)) or self._recordings.get(_key(rows + 1, inputs))
        self.was_replayed = recording is not None and not inputs.adapters
        if recording is None or inputs.adapters:
            return self._call(inputs)
        # A surplus row keeps the values of an earlier call, and its result is ignored.
        tensors = inputs.tensors()
        for name, tensor in recording.inputs.tensors().items():
            tensor[:rows].copy_(tensors[name])
        recording.replay()
        return recording.result[:rows].clone()


def shapes_of(inputs: RowInputs) -> tuple[object, ...]:
    """Equal for inputs whose tensors have the same shapes and dtypes."""
    return _key(inputs.rows, inputs)


def _key(rows: int, inputs: RowInputs) -> tuple[object, ...]:
    return rows, *((name, tensor.shape[1:], tensor.dtype) for name, tensor in inputs.tensors().items())


class CudaGraphs:
    """Records as PyTorch's documentation of CUDA graphs says: a few runs on a separate stream, then the captured one.

    All graphs share one memory pool: they are never replayed at the same time, and their results are copied.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # of PyTorch

    def __call__(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = work()
        return graph.replay, result
