"""safetensors files written byte by byte, right or wrong, without the code that reads them and without torch."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I64": 8, "F8_E4M3": 1}


def write(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: str = "F32",
    metadata: Any = None,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    fill: bytes = b"\0",
) -> Path:
    """A file of zeros. `changes`: what the header says of a tensor instead."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * _BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]} | dict((changes or {}).get(name, {}))
    if fill != b"\0":
        return write_raw(file, json.dumps(header).encode(), (fill * end)[:end])
    write_raw(file, json.dumps(header).encode())
    os.truncate(file, file.stat().st_size + end)  # zeros that take no room on the disk, however large the model
    return file


def write_raw(file: Path, header: bytes, data: bytes = b"", *, header_size: int | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack("<Q", len(header) if header_size is None else header_size) + header + data)
    return file
