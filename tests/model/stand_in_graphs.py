"""A stand-in for CUDA graphs on a CPU: records torch's operations with their tensors and computes them again on the same memory.

As with a real graph, no Python of the model runs in a replay: a buffer that is not filled, or a hook that came later, shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of PyTorch
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result


class StandInGraphs:
    """A recorder that counts its replays."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        with _Tape() as tape:
            result = work()

        def replay() -> None:
            self.replays += 1
            for func, args, kwargs, recorded in tape.operations:
                _put(func(*args, **kwargs), recorded)

        return replay, result


def _put(result: Any, recorded: Any) -> None:
    if isinstance(recorded, torch.Tensor):
        if result.data_ptr() != recorded.data_ptr():  # else it is a view, or was computed in place
            recorded.copy_(result)
    elif isinstance(recorded, tuple | list):
        for one, other in zip(result, recorded, strict=True):
            _put(one, other)
