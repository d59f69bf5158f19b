"""Computes UNet calls in the way in use. What the way was not set up for is computed eagerly: rows with adapters, and other shapes.

Does not know jobs, nor why a way was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from stable_diffusion.engine.adapters import AdaptedLayers
from stable_diffusion.engine.cuda_graphs import CudaGraphs, RecordedCalls, Recorder, shapes_of
from stable_diffusion.engine.row_inputs import RowInputs
from stable_diffusion.engine.ways import EAGER, Way


class UNetCalls:
    """The UNet of a model, called with rows. `last_way`: in which way the last call was computed."""

    def __init__(self, unet: Any, make_recorder: Callable[[], Recorder] = CudaGraphs, compiler: Any = "inductor") -> None:
        """`make_recorder`: of CUDA graphs. `compiler`: torch.compile's backend."""
        self._unet = unet
        self._make_recorder = make_recorder
        self._compiler = compiler
        self._adapted = AdaptedLayers(unet)
        self._recorded = RecordedCalls(self._compute)
        self._compiled: Any = None
        self._compiled_shapes: set[object] = set()
        self.way = EAGER
        self.last_way = EAGER

    @torch.inference_mode()
    def use(self, way: Way, row: RowInputs, rows: Sequence[int]) -> int:
        """Compute calls with each number of `rows`, made of the single row `row`, in this way from now on; others stay eager.

        Returns the most rows for which it could be set up: fewer than asked for if memory ran out. If it raises, calls are eager.
        """
        self.reset()
        try:
            return self._set_up(way, row, sorted(rows))
        except BaseException:
            self.reset()
            raise

    def _set_up(self, way: Way, row: RowInputs, rows: Sequence[int]) -> int:
        self.way = way
        if way.channels_last:
            self._unet.to(memory_format=torch.channels_last)
        if way.compiled:
            self._compile(row, rows)
        if way.graphs:
            return self._recorded.record(self._make_recorder(), row, rows)
        return rows[-1]

    def _compile(self, row: RowInputs, rows: Sequence[int]) -> None:
        """Compile once for all numbers of rows from 2: for each its own would take a minute. One row is another case for the compiler."""
        self._compiled = torch.compile(self._unet, backend=self._compiler)
        for count in sorted({*rows, *(count - 1 for count in rows)} - {0, 1}):
            inputs = row.repeated(count)
            for tensor in inputs.tensors().values():
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            self._compiled_shapes.add(shapes_of(inputs))
            self._compute(inputs)

    def reset(self) -> None:
        """Compute eagerly, with the model as it was loaded. Frees what the way held."""
        self._recorded.forget()
        if self._compiled is not None:
            self._compiled = None
            self._compiled_shapes.clear()
            torch._dynamo.reset()
        if self.way.channels_last:
            self._unet.to(memory_format=torch.contiguous_format)
        self.way = EAGER
        torch.cuda.empty_cache()  # does nothing without a GPU

    @torch.inference_mode()
    def __call__(self, inputs: RowInputs) -> torch.Tensor:
        predicted = self._recorded(inputs)
        self.last_way = replace(self.way, compiled=self._is_compiled(inputs), graphs=False)
        if self._recorded.was_replayed:
            self.last_way = self.way
        return predicted

    def _is_compiled(self, inputs: RowInputs) -> bool:
        return self._compiled is not None and not inputs.adapters and shapes_of(inputs) in self._compiled_shapes

    @torch.inference_mode()
    def _compute(self, inputs: RowInputs) -> torch.Tensor:
        unet = self._unet
        if self._is_compiled(inputs):
            unet, inputs = self._compiled, inputs.contiguous()  # for other strides it would be compiled again
        with self._adapted.applied(inputs.adapters):
            predicted: torch.Tensor = unet(
                inputs.latents,
                inputs.timesteps,
                encoder_hidden_states=inputs.embeddings,
                encoder_attention_mask=inputs.mask,
                timestep_cond=inputs.guidance,
                added_cond_kwargs=None if inputs.pooled is None else {"text_embeds": inputs.pooled, "time_ids": inputs.time_ids},
                return_dict=False,
            )[0]
        # The rest of the engine keeps the memory format of eager calls.
        return predicted.contiguous() if self.way.channels_last else predicted
