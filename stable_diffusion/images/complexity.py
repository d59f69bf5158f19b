"""Counts the pieces of a PNG or JPEG file before Pillow reads it, and refuses files with too many.

Pillow reads the pieces one by one in Python, and goes through the whole image again for each scan of a progressive JPEG; a file of
20 MiB can hold half a million scans. WebP needs no count: C code reads its pieces, once.
"""

from __future__ import annotations

import re
import struct

from stable_diffusion.images.png import MAX_EXIF_BYTES
from stable_diffusion.images.png import SIGNATURE as _PNG

MAX_PIECES = 2**14  # PNG chunks or JPEG segments; a large photograph has a few hundred
MAX_SCANS = 64  # progressive JPEGs have about ten
_MAX_EXIF_SEGMENTS = MAX_EXIF_BYTES // 2**16
_MAX_BYTES_BETWEEN = 2**16  # total bytes between JPEG segments

_JPEG = b"\xff\xd8\xff"
_EXIF = b"Exif\0\0"
# ITU-T T.81, B.1.1: a marker, perhaps after fill bytes. FF 00 is data; D0 to D7 and 01 are markers within data.
_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)
_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
# Segments that Pillow reads at once. It reads others byte by byte, or refuses them.
_READ_AT_ONCE = {*range(0xC0, 0xC8), *range(0xC9, 0xF0), 0xFE}


def too_many_pieces(content: bytes) -> str | None:
    """Say what the file has too many of. None if it is acceptable, or neither PNG nor JPEG."""
    if content.startswith(_PNG):
        return _too_many_chunks(content)
    if content.startswith(_JPEG):
        return _too_many_segments(content)
    return None


def _too_many_chunks(content: bytes) -> str | None:
    position, count = len(_PNG), 0
    while position + 8 <= len(content) and content[position + 4 : position + 8] != b"IEND":
        (length,) = struct.unpack_from(">I", content, position)
        position += 12 + length
        count += 1
        if count > MAX_PIECES:
            return f"more than {MAX_PIECES} chunks"
    return None


def _too_many_segments(content: bytes) -> str | None:
    # This allows one extra: a thumbnail within the block may contain the marker once more.
    if content.count(_EXIF) > _MAX_EXIF_SEGMENTS:
        return f"EXIF in more than {_MAX_EXIF_SEGMENTS} segments"
    position, count, scans, between = 2, 0, 0, 0
    while marker := _MARKER.search(content, position):
        kind = marker[1][0]
        if kind == _END and scans:  # Pillow ignores one before the first scan
            return None
        has_length = kind not in (_START, _END) and marker.end() + 2 <= len(content)
        length = struct.unpack_from(">H", content, marker.end())[0] if has_length else 0
        count += 1
        scans += kind == _SCAN
        if not scans:
            between += marker.end() - 2 - position + (0 if kind in _READ_AT_ONCE else length)
        if count > MAX_PIECES:
            return f"more than {MAX_PIECES} segments"
        if scans > MAX_SCANS:
            return f"more than {MAX_SCANS} scans"
        if between > _MAX_BYTES_BETWEEN:
            return f"more than {_MAX_BYTES_BETWEEN} bytes between its segments"
        position = marker.end() + length
    return None
