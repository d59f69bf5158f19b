"""LoRA adapters at work: each row of a call gets its own, by hooks on the layers that they change (Hu et al. 2021).

The arithmetic is peft's, in peft's order, so a row with adapters equals peft's unfused layers bit for bit. Does not know files, names or
jobs; `lora_store.py` loads adapters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch


@dataclass(frozen=True)
class LowRank:
    """The change of one layer: up(down(x)) * weight * alpha / rank.

    Shapes: down (rank, in, ...), up (out, rank, ...), with kernels for convolutions.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    def scale(self, weight: float) -> float:
        return weight * self.alpha / len(self.down)

    @property
    def size_bytes(self) -> int:
        return self.down.nbytes + self.up.nbytes


@dataclass(frozen=True, eq=False)
class Lora:
    """An adapter's changes by module name, of the UNet and of the text encoders."""

    name: str
    hash: str
    unet: Mapping[str, LowRank]
    text_encoder: Mapping[str, LowRank]
    text_encoder_2: Mapping[str, LowRank]

    @property
    def changes_text(self) -> bool:
        return bool(self.text_encoder or self.text_encoder_2)

    @functools.cached_property
    def size_bytes(self) -> int:
        return sum(change.size_bytes for part in (self.unet, self.text_encoder, self.text_encoder_2) for change in part.values())


# The changes of one row, with their weights, in the order in which they are added.
RowAdapters = tuple[tuple[Mapping[str, LowRank], float], ...]


@dataclass(frozen=True)
class _Slice:
    """Neighbouring rows with the same adapters."""

    start: int
    end: int
    adapters: RowAdapters


class AdaptedLayers:
    """The layers of one model that adapters can change. Without adapters the model is as if this did not exist."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)}

    @contextmanager
    def applied(self, adapters: Sequence[RowAdapters]) -> Iterator[None]:
        """Within the block, row i of each call of the model has the adapters `adapters[i]`. Empty: no row has any."""
        slices = _slices(adapters)
        names = {name for one in slices for changes, _ in one.adapters for name in changes}
        hooks = [self._layers[name].register_forward_hook(_hook(name, slices)) for name in names]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _slices(adapters: Sequence[RowAdapters]) -> list[_Slice]:
    slices = []
    start = 0
    for key, rows in groupby(adapters, key=lambda row: [(id(changes), weight) for changes, weight in row]):
        row, *others = rows
        end = start + 1 + len(others)
        if key:
            slices.append(_Slice(start, end, row))
        start = end
    return slices


def _hook(name: str, slices: Sequence[_Slice]) -> Callable[[Any, Any, torch.Tensor], torch.Tensor]:
    changes = [(one.start, one.end, change[name], weight) for one in slices for change, weight in one.adapters if name in change]

    def add(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        for start, end, change, weight in changes:
            output[start:end] += _changed(layer, inputs[0][start:end], change) * change.scale(weight)
        return output

    return add


def _changed(layer: torch.nn.Module, rows: torch.Tensor, change: LowRank) -> torch.Tensor:
    if isinstance(layer, torch.nn.Linear):
        return torch.nn.functional.linear(torch.nn.functional.linear(rows, change.down), change.up)
    assert isinstance(layer, torch.nn.Conv2d)
    down = torch.nn.functional.conv2d(rows, change.down, stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
    return torch.nn.functional.conv2d(down, change.up)
