"""The LoRA adapters on the device: loads them without delaying steps, and removes those that no job uses.

A thread reads files; the engine's thread turns their bytes into tensors, a little at a time. Does not know how adapters are applied.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from stable_diffusion.core.errors import InvalidRequest
from stable_diffusion.core.limits import MAX_LORA_BYTES
from stable_diffusion.core.types import LoraChoice
from stable_diffusion.engine.adapters import Lora, LowRank
from stable_diffusion.engine.copies import to_device
from stable_diffusion.models.lora_names import COMPONENTS, Component
from stable_diffusion.models.loras import HASH_DIGITS, LayerChange, LoraFile, Loras
from stable_diffusion.models.safetensors import parse_tensor_list

logger = logging.getLogger("stable_diffusion")

_REMEMBERED_FAULTS = 64
_BYTES_AT_ONCE = 4 * 2**20  # converted in one go: a few milliseconds
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}

Identity = tuple[str, str]  # name and hash


@dataclass(eq=False)
class _Loading:
    """An adapter being loaded: first its file's bytes, read by a thread, then its layers one by one. It ends when no claim wants it."""

    size_bytes: int  # on the device
    tensors: dict[str, torch.Tensor] | None = None  # as they are in the file
    fault: str | None = None  # why it cannot be loaded
    left: list[tuple[Component, str, LayerChange]] = field(default_factory=list)
    done: dict[Component, dict[str, LowRank]] = field(default_factory=lambda: {component: {} for component in COMPONENTS})
    tried_again: bool = False  # after memory ran out


@dataclass(eq=False)
class Claim:
    """A job's hold on its adapters. Drop it when the job ends; adapters that nothing holds leave the device."""

    choices: tuple[LoraChoice, ...]
    is_granted: bool = False  # there is room for all of them
    loras: dict[Identity, Lora] = field(default_factory=dict)
    loading: dict[Identity, _Loading] = field(default_factory=dict)
    fault: str | None = None  # why one of them cannot be loaded

    def adapters(self) -> tuple[Lora, ...]:
        """The adapters in the order of `choices`. Raises InvalidRequest, which says why one could not be loaded."""
        if self.fault is not None:
            raise InvalidRequest(f"loras: {self.fault}", field="loras")
        return tuple(self.loras[_identity(choice)] for choice in self.choices)


class LoraStore:
    """Adapters by name and hash. Use it on the engine's thread."""

    def __init__(self, look: Callable[[], Loras], device: torch.device, dtype: torch.dtype, max_bytes: int = MAX_LORA_BYTES) -> None:
        """`look` returns the files that exist now; it is called on other threads. No claim may need more than `max_bytes`."""
        self._look = look
        self._device = device
        self._dtype = dtype
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Identity, Lora] = OrderedDict()  # the last used one at the end
        # Also those that only jobs hold.
        self._alive: weakref.WeakValueDictionary[Identity, Lora] = weakref.WeakValueDictionary()
        self._loading: weakref.WeakValueDictionary[Identity, _Loading] = weakref.WeakValueDictionary()
        self._faults: OrderedDict[Identity, str] = OrderedDict()  # by content, so that a faulty file is not read again
        self._next_in_line: Callable[[], Claim | None] = lambda: None  # the first claim for which there was no room
        self._rest_until_s = 0.0

    @property
    def held_bytes(self) -> int:
        return sum(lora.size_bytes for lora in list(self._alive.values()))

    def __len__(self) -> int:
        return len(self._alive)

    def go_on(self, claim: Claim) -> bool:
        """Whether a claim's adapters are loaded, or one of them cannot be. Otherwise loads some more: call this again at the next turn.

        Room is granted for all adapters of a claim at once, and to claims in their order of arrival, so that claims neither deadlock nor
        wait for ever.
        """
        claim.fault = claim.fault or self._known_fault(claim)
        if claim.fault is None and not claim.is_granted:
            claim.is_granted = self._grant(claim)
        for identity, loading in list(claim.loading.items()):
            lora = self._alive.get(identity) or self._convert(identity, loading)
            if lora is not None:
                claim.loras[identity] = lora
                del claim.loading[identity]
            claim.fault = claim.fault or loading.fault
        if claim.fault is not None:
            claim.loras, claim.loading = {}, {}
            return True
        return claim.is_granted and not claim.loading

    def _known_fault(self, claim: Claim) -> str | None:
        return next((self._faults[_identity(choice)] for choice in claim.choices if _identity(choice) in self._faults), None)

    def _grant(self, claim: Claim) -> bool:
        """Make room by removing adapters that no job uses, the longest unused first. False if there is too little room."""
        first = self._next_in_line()
        if first is not None and first is not claim:
            return False
        loras: dict[Identity, Lora] = {}
        coming: dict[Identity, _Loading] = {}
        new_bytes = 0
        for identity, choice in {_identity(choice): choice for choice in claim.choices}.items():
            lora = self._alive.get(identity)
            if lora is not None:
                loras[identity] = lora
                self._keep(identity, lora)
                continue
            loading = self._loading.get(identity)
            if loading is None:
                loading = _Loading(choice.size_bytes * self._dtype.itemsize // torch.float32.itemsize)
                new_bytes += loading.size_bytes
            coming[identity] = loading
        while self._kept and self._expected_bytes() + new_bytes > self._max_bytes:
            self._kept.popitem(last=False)
        if new_bytes and self._expected_bytes() + new_bytes > self._max_bytes:
            self._next_in_line = weakref.ref(claim)
            return False
        self._next_in_line = lambda: None
        claim.loras, claim.loading = loras, coming
        for identity, loading in coming.items():
            if identity not in self._loading:
                self._loading[identity] = loading
                threading.Thread(target=_read, args=(identity, loading, self._look), name=f"lora {identity[0]}", daemon=True).start()
        return True

    def _expected_bytes(self) -> int:
        return self.held_bytes + sum(loading.size_bytes for loading in list(self._loading.values()))

    def _keep(self, identity: Identity, lora: Lora) -> None:
        self._kept[identity] = lora
        self._kept.move_to_end(identity)

    def _convert(self, identity: Identity, loading: _Loading) -> Lora | None:
        """Convert some more layers. Returns the adapter when it is complete.

        While steps run, this takes at most half of the time: after each call it rests for as long as the call took.
        """
        began_s = time.perf_counter()
        if loading.fault is not None:
            self._end(identity, loading)
        if loading.tensors is None or began_s < self._rest_until_s:
            return None
        try:
            self._convert_some(identity[0], loading, loading.tensors)
        except torch.OutOfMemoryError:
            if loading.tried_again:
                raise
            loading.tried_again = True
            self._kept.clear()
            torch.cuda.empty_cache()
        ended_s = time.perf_counter()
        self._rest_until_s = ended_s + (ended_s - began_s)
        if loading.fault is not None:
            self._faults[identity] = loading.fault
            if len(self._faults) > _REMEMBERED_FAULTS:
                self._faults.popitem(last=False)
        if loading.left or loading.fault is not None:
            return None
        self._end(identity, loading)
        lora = Lora(identity[0], identity[1], *(loading.done[component] for component in COMPONENTS))
        self._alive[identity] = lora
        self._keep(identity, lora)
        logger.info("LoRA %s is loaded, %.1f MB.", lora.name, lora.size_bytes / 1e6)
        return lora

    def _end(self, identity: Identity, loading: _Loading) -> None:
        """Remove the entry: later claims find the adapter, or read its file again."""
        if self._loading.get(identity) is loading:
            del self._loading[identity]

    def _convert_some(self, name: str, loading: _Loading, tensors: dict[str, torch.Tensor]) -> None:
        converted = 0
        while loading.left and converted < _BYTES_AT_ONCE:
            component, layer, change = loading.left[-1]
            low_rank = self._converted(change, tensors)
            if low_rank is None:
                loading.fault = f"{name}: it contains NaN or infinity"
                return
            loading.done[component][layer] = low_rank
            loading.left.pop()
            converted += low_rank.size_bytes

    def _converted(self, change: LayerChange, tensors: dict[str, torch.Tensor]) -> LowRank | None:
        """The change on the device; None if a value is not finite."""
        # Copies, so that the file's bytes can be freed.
        down = tensors[change.down].reshape(change.down_shape).to(self._dtype, copy=True)
        up = tensors[change.up].reshape(change.up_shape).to(self._dtype, copy=True)
        alpha = float(len(down)) if change.alpha is None else float(tensors[change.alpha])
        if not (torch.isfinite(down).all() and torch.isfinite(up).all() and abs(alpha) < float("inf")):
            return None
        return LowRank(to_device(down, self._device), to_device(up, self._device), alpha)


def claimed(choices: Sequence[LoraChoice]) -> Claim:
    """A new claim. It is granted at once if there is nothing to load."""
    return Claim(tuple(choices), is_granted=not choices)


def _identity(choice: LoraChoice) -> Identity:
    return choice.name, choice.hash


def _read(identity: Identity, loading: _Loading, look: Callable[[], Loras]) -> None:
    """Runs on a separate thread. Reads bytes and computes nothing, since a second thread with OpenMP would slow down every step."""
    name, content_hash = identity
    try:
        file = look().files.get(name)
        tensors = None if file is None else _read_tensors(file, content_hash)
    except Exception:
        # Jobs that wait for the adapter must learn of every error.
        logger.exception("The LoRA %s could not be read.", name)
        loading.fault = f"{name}: its file cannot be read"
        return
    if file is None or tensors is None:
        loading.fault = f"{name}: its file is gone or has changed"
        return
    loading.left = [(component, layer, change) for component, layers in file.layers.items() for layer, change in layers.items()]
    loading.tensors = tensors


def _read_tensors(file: LoraFile, content_hash: str) -> dict[str, torch.Tensor] | None:
    """The tensors, which share the memory of the file's bytes. None if its content is not that of `content_hash`."""
    content = bytearray(file.path.stat().st_size)
    with file.path.open("rb") as stream:
        stream.readinto(content)
    described, header_bytes = parse_tensor_list(bytes(content[: 8 + file.header_bytes]))
    start = 8 + header_bytes
    if hashlib.sha256(memoryview(content)[start:]).hexdigest()[:HASH_DIGITS] != content_hash:
        return None
    tensors = {}
    for name, one in described.items():
        begin, end = one["data_offsets"]
        dtype = _DTYPES[one["dtype"]]
        count = (end - begin) // dtype.itemsize
        tensors[name] = torch.frombuffer(content, dtype=dtype, count=count, offset=start + begin).reshape(one["shape"])
    return tensors
