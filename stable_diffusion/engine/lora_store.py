"""The LoRA adapters on the device: loads them without holding up steps, and lets go of those that no job uses.

A thread reads files; the engine's thread turns their bytes into tensors, a little in each turn. Does not know how adapters are applied.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import safetensors.torch
import torch

from stable_diffusion.core.errors import InvalidRequest
from stable_diffusion.core.requests import MAX_LORA_BYTES
from stable_diffusion.core.types import LoraChoice
from stable_diffusion.engine.adapters import Lora, LowRank
from stable_diffusion.models.lora_names import Component
from stable_diffusion.models.loras import LayerChange, LoraFile, Loras

logger = logging.getLogger("stable_diffusion")

_REMEMBERED_FAILURES = 64
_BYTES_A_TURN = 8 * 2**20  # converted between two steps: some milliseconds

Identity = tuple[str, str]  # name and hash


@dataclass
class _Loading:
    """An adapter on its way: first its file's bytes, read by a thread, then its layers one by one."""

    file: LoraFile
    content: bytes | None = None
    error: InvalidRequest | None = None
    left: list[tuple[Component, str, LayerChange]] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] | None = None
    done: dict[Component, dict[str, LowRank]] = field(default_factory=lambda: {"unet": {}, "text_encoder": {}})


class LoraStore:
    """Adapters by name and hash. Use it on the engine's thread."""

    def __init__(self, look: Callable[[], Loras], device: torch.device, dtype: torch.dtype, max_bytes: int = MAX_LORA_BYTES) -> None:
        """`look` returns the files that there are."""
        self._look = look
        self._device = device
        self._dtype = dtype
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Identity, Lora] = OrderedDict()  # the last used one at the end
        # Also those that only jobs hold. An adapter leaves the device when nothing holds it any more.
        self._alive: weakref.WeakValueDictionary[Identity, Lora] = weakref.WeakValueDictionary()
        self._loading: dict[Identity, _Loading] = {}
        self._failed: dict[Identity, InvalidRequest] = {}  # of the same content again, so it is not read again

    @property
    def held_bytes(self) -> int:
        return sum(lora.size_bytes for lora in self._alive.values())

    def __len__(self) -> int:
        return len(self._alive)

    def ready(self, choices: Sequence[LoraChoice]) -> tuple[Lora, ...] | None:
        """The adapters of a job, or None while one is being loaded or does not fit beside those in use: ask again at the next turn.

        Raises InvalidRequest if a file is gone, has changed or cannot be used.
        """
        found = [self._get(choice) for choice in choices]
        return None if None in found else tuple(lora for lora in found if lora is not None)

    def _get(self, choice: LoraChoice) -> Lora | None:
        identity = choice.name, choice.hash
        if (lora := self._alive.get(identity)) is not None:
            self._kept[identity] = lora
            self._kept.move_to_end(identity)
            return lora
        if identity in self._failed:
            raise self._failed[identity]
        loading = self._loading.get(identity)
        if loading is None:
            self._begin(identity)
            return None
        try:
            if loading.error is not None:
                raise loading.error
            return None if loading.content is None else self._go_on(identity, loading)
        except InvalidRequest as error:
            self._loading.pop(identity, None)
            self._failed = dict(list(self._failed.items())[-_REMEMBERED_FAILURES:]) | {identity: error}
            raise

    def _begin(self, identity: Identity) -> None:
        name, content_hash = identity
        file = self._look().files.get(name)
        if file is None or file.hash != content_hash:
            raise _unusable(name, "its file is gone or has changed")
        if not self._has_room_for(file.size_bytes):
            return
        loading = self._loading[identity] = _Loading(file)
        threading.Thread(target=_read, args=(loading,), name=f"lora {name}", daemon=True).start()

    def _has_room_for(self, size_bytes: int) -> bool:
        """Make room by letting go of adapters that no job uses, the longest unused first."""
        coming = sum(loading.file.size_bytes for loading in self._loading.values())
        while self._kept and self.held_bytes + coming + size_bytes > self._max_bytes:
            self._kept.popitem(last=False)
        return self.held_bytes + coming + size_bytes <= self._max_bytes or not (self._alive or self._loading)

    def _go_on(self, identity: Identity, loading: _Loading) -> Lora | None:
        """Convert some more layers. Returns the adapter when it is complete."""
        if loading.tensors is None:
            assert loading.content is not None
            loading.tensors = safetensors.torch.load(loading.content)
            loading.left = [
                (component, layer, change) for component, layers in loading.file.layers.items() for layer, change in layers.items()
            ]
        converted = 0
        while loading.left and converted < _BYTES_A_TURN:
            component, layer, change = loading.left.pop()
            low_rank = self._converted(loading.file.name, change, loading.tensors)
            loading.done[component][layer] = low_rank
            converted += low_rank.size_bytes
        if loading.left:
            return None
        del self._loading[identity]
        lora = Lora(loading.file.name, loading.done["unet"], loading.done["text_encoder"])
        self._kept[identity] = self._alive[identity] = lora
        logger.info("LoRA %s is loaded, %.1f MB.", lora.name, lora.size_bytes / 1e6)
        return lora

    def _converted(self, name: str, change: LayerChange, tensors: dict[str, torch.Tensor]) -> LowRank:
        down, up = tensors[change.down], tensors[change.up]
        alpha = float(len(down)) if change.alpha is None else float(tensors[change.alpha])
        if not (torch.isfinite(down).all() and torch.isfinite(up).all() and abs(alpha) < float("inf")):
            raise _unusable(name, "it holds values that are no numbers")
        return LowRank(down.to(self._device, self._dtype), up.to(self._device, self._dtype), alpha)


def _read(loading: _Loading) -> None:
    """On a thread of its own: reads bytes and computes nothing, since a second thread with OpenMP would slow every step down."""
    try:
        loading.content = loading.file.path.read_bytes()
    except OSError:
        loading.error = _unusable(loading.file.name, "its file cannot be read")


def _unusable(name: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"loras: {name}: {why}", field="loras")
