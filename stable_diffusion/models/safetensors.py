"""Reads safetensors files without torch: checks that a file is complete, and samples its tensors for a hash."""

from __future__ import annotations

import json
import math
import operator
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stable_diffusion.core.errors import ModelFolderError

SAMPLE_BYTES = 4096  # of each tensor
VALUE_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library


def check_safetensors(file: Path) -> None:
    """Compare the file's size with the one its header implies (https://github.com/huggingface/safetensors, Format)."""
    if not file.is_file():
        raise ModelFolderError(f"{file}: missing")
    size = file.stat().st_size
    try:
        tensors, header_size = read_tensor_list(file)
        data_size = max((operator.index(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise ModelFolderError(f"{file}: not a safetensors file, perhaps half downloaded or a Git LFS pointer") from None
    if size != 8 + header_size + data_size:
        raise ModelFolderError(f"{file}: has {size} bytes, {8 + header_size + data_size} are expected, perhaps half downloaded")


def read_tensor_list(file: Path) -> tuple[dict[str, Any], int]:
    """The header's description of each tensor by name, and the header's length. A broken header raises whatever its parsing raises."""
    header, header_size = _read_header(file)
    return _without_metadata(header), header_size


def parse_tensor_list(prefix: bytes) -> tuple[dict[str, Any], int]:
    """As `read_tensor_list`, from a file's first bytes up to the header's end."""
    (header_size,) = struct.unpack("<Q", prefix[:8])
    return _without_metadata(json.loads(prefix[8 : 8 + header_size])), header_size


def fault_of(tensor: Any) -> str | None:
    """The fault in a header's description of a tensor, which may be any JSON. None if the tensor can be read and holds real numbers."""
    shape, dtype, offsets = (tensor.get(field) for field in ("shape", "dtype", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in VALUE_BYTES:
        return f"holds {str(dtype)[:20]}, expected {', '.join(VALUE_BYTES)}"
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2 and 0 not in shape):
        return "has no valid shape and data_offsets"
    if offsets[1] - offsets[0] != math.prod(shape) * VALUE_BYTES[dtype]:
        return f"has {offsets[1] - offsets[0]} bytes, which do not match the shape {shape} of {dtype}"
    return None


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and len(values) <= 8 and all(type(value) is int and 0 <= value < 2**40 for value in values)


def read_metadata(file: Path) -> dict[str, str]:
    """The free texts that a checked file's header holds, such as what it was trained with."""
    found = _read_header(file)[0].get("__metadata__")
    return {name: text for name, text in found.items() if isinstance(text, str)} if isinstance(found, dict) else {}


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        header_bytes = stream.read(header_size) if 0 < header_size <= min(file.stat().st_size, _MAX_HEADER_BYTES) else b""
    header: dict[str, Any] = json.loads(header_bytes)
    return header, header_size


def _without_metadata(header: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}


def samples_of(file: Path) -> Iterator[tuple[str, bytes]]:
    """For each tensor: its name, dtype and shape, and the bytes in its middle."""
    tensors, header_size = read_tensor_list(file)
    with file.open("rb") as stream:
        for name, tensor in tensors.items():
            start, end = tensor["data_offsets"]
            length = min(end - start, SAMPLE_BYTES)
            stream.seek(8 + header_size + start + (end - start - length) // 2)
            yield f"{name} {tensor['dtype']} {tensor['shape']}", stream.read(length)
