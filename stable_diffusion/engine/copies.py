"""Copies to a GPU that the CPU does not wait for, also those that diffusers makes: from pinned memory, in the order of the GPU's work.

By default torch waits after such a copy until the GPU has done everything that was launched before. Values do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. From a CPU to a GPU nothing waits: PyTorch keeps the pinned memory until the copy is done."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


_CAN_COPY = frozenset({torch.Tensor.to, torch.Tensor.__getitem__, torch.tensor})


class AsynchronousCopies(TorchFunctionMode):
    """Within the block, copies of this thread from the CPU to a device of the given type go through `copy`.

    Covers what diffusers' noise schedulers and the text encoders do: `Tensor.to`, `torch.tensor` with a device, and an index that is a
    list of numbers.
    """

    def __init__(self, device_type: str = "cuda", copy: Callable[[torch.Tensor, torch.device], torch.Tensor] = to_device) -> None:
        super().__init__()
        self._device_type = device_type
        self._copy = copy

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func not in _CAN_COPY:  # first, because all operations come here, and even the look at a shape
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if func is torch.Tensor.to and args[0].device.type == "cpu":
            return self._to(args[0], args[1:], kwargs)
        if func is torch.tensor and self._is_there(kwargs.get("device")):
            device = torch.device(kwargs["device"])
            return self._copy(func(*args, **{**kwargs, "device": "cpu"}), device)
        if func is torch.Tensor.__getitem__ and isinstance(args[1], list) and self._is_there(args[0].device):
            return func(args[0], self._copy(torch.tensor(args[1]), args[0].device))
        return func(*args, **kwargs)

    def _to(self, tensor: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """`Tensor.to` of a tensor on the CPU: first the dtype, as there, then the copy."""
        others = [one for one in args if not self._is_there(one)]
        device = next((one for one in (*args, kwargs.get("device")) if self._is_there(one)), None)
        if device is None:
            return tensor.to(*args, **kwargs)
        changed = {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking")}
        device = device.device if isinstance(device, torch.Tensor) else torch.device(device)
        if isinstance(next(iter(args), None), torch.Tensor):  # like another tensor: its dtype too
            others = [args[0].dtype]
        return self._copy(tensor.to(*others, **changed) if others or changed else tensor, device)

    def _is_there(self, place: Any) -> bool:
        """Whether a device, its name or a tensor is of the type."""
        if isinstance(place, torch.Tensor):
            place = place.device
        return isinstance(place, torch.device | str) and torch.device(place).type == self._device_type
