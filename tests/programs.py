"""Programs that write and read pictures apart from Pillow, for tests. A test whose program is missing is skipped, by its name."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

Pixels = npt.NDArray[np.int16]
_LIMIT_S = 60


def imagemagick(*arguments: str | Path, file: bytes = b"") -> bytes:
    """What ImageMagick writes to its output, with `file` at its input."""
    # Of version 7 `magick`, before it `convert`; others have a program of that name too, but not beside `identify`.
    return _output_of(["magick", "convert"] if shutil.which("identify") else [], "ImageMagick", arguments, file)


def exiftool(*arguments: str | Path, file: bytes) -> bytes:
    """What exiftool makes of `file`: a changed file if it is told to write, else what it reads of it."""
    writes = any("=" in str(argument) for argument in arguments)
    return _output_of(["exiftool"], "exiftool", (*arguments, *(("-o", "-") if writes else ()), "-"), file)


def exiftool_each(changes: Mapping[Path, Sequence[str]]) -> None:
    """Change each file as its arguments say, by one process: exiftool takes a second to start."""
    commands = [(*arguments, "-overwrite_original", "-quiet", str(file), "-execute") for file, arguments in changes.items()]
    _output_of(["exiftool"], "exiftool", tuple(word for command in commands for word in command), b"")


def cwebp(*arguments: str | Path, file: Path) -> bytes:
    """`file` as WebP."""
    return _output_of(["cwebp"], "cwebp", ("-quiet", *arguments, file, "-o", "-"), b"")


def pnmtopng(*arguments: str, file: bytes) -> bytes:
    """Netpbm's picture as PNG."""
    return _output_of(["pnmtopng"], "netpbm", arguments, file)


def pixels_by_imagemagick(file: bytes, *operations: str | Path, mode: str = "rgb") -> Pixels:
    """The pixels of `file` as ImageMagick reads them, after `operations`: an array of height, width and, if `mode` is "rgb", 3."""
    size = imagemagick("-", *operations, "-format", "%w %h\n", "info:-", file=file).split(b"\n")[0]
    width, height = map(int, size.split())
    raw = np.frombuffer(imagemagick("-", *operations, "-depth", "8", f"{mode}:-", file=file), np.uint8).astype(np.int16)
    return raw.reshape((height, width, 3) if mode == "rgb" else (height, width))


def _output_of(names: list[str], program: str, arguments: tuple[str | Path, ...], file: bytes) -> bytes:
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"{program} is not installed")
    finished = subprocess.run([found, *map(str, arguments)], input=file, capture_output=True, timeout=_LIMIT_S, check=False)
    assert finished.returncode == 0, finished.stderr.decode(errors="replace")
    return finished.stdout
