"""Splits a PNG file into the chunks that its pixels need and the rest: EXIF, XMP, profile, texts.

Pillow refuses a whole file for a damaged or large chunk that no pixel needs; libpng, browsers and editors read it. So Pillow gets only
the chunks that the pixels need. Does not depend on Pillow, and decodes no pixels.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from stable_diffusion.core.errors import InvalidRequest, TooLarge

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_TEXT_BYTES = 2**20  # of one text, decompressed
MAX_EXIF_BYTES = 2**20
MAX_PROFILE_BYTES = 4 * 2**20  # decompressed; printers' profiles have up to 3 MiB

_GREY, _RGB, _PALETTE = 0, 2, 3  # colour types
_HEADER_BYTES = 13
_SAMPLES_OF_KEY = {_GREY: 1, _RGB: 3}
_PIXELS = b"IDAT"
_NEEDED = (b"IHDR", b"PLTE", b"tRNS", _PIXELS)
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_END = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
_EXIF_TEXT, _XMP_TEXT = "Raw profile type exif", "XML:com.adobe.xmp"  # ImageMagick writes the first one, in hexadecimal


@dataclass(frozen=True)
class _Chunk:
    kind: bytes
    data: memoryview
    whole: memoryview  # with length, name and checksum
    is_cut_short: bool

    def is_intact(self) -> bool:
        """Whether it is complete and its checksum correct."""
        return not self.is_cut_short and zlib.crc32(self.data, zlib.crc32(self.kind)) == struct.unpack(">I", self.whole[-4:])[0]


@dataclass(frozen=True)
class Png:
    """The parts of a file. `pixels` is a PNG file of its own.

    `colour_key` is the one colour that is transparent, as samples of `depth` bits: one of grey, or red, green and blue.
    Texts are decompressed on access.
    """

    pixels: bytes
    depth: int
    colour_key: tuple[int, ...] | None
    exif: bytes | None
    profile: bytes | None
    _texts: Mapping[str, _Chunk] = field(repr=False)

    @property
    def names_of_texts(self) -> list[str]:
        return list(self._texts)

    @property
    def xmp(self) -> bytes | None:
        """None if it is missing, damaged or longer than a text may be. Only its orientation is used."""
        try:
            return _bytes_of(self._texts[_XMP_TEXT], MAX_TEXT_BYTES) if _XMP_TEXT in self._texts else None
        except (ValueError, OverflowError):
            return None

    def text(self, name: str, part: str) -> str | None:
        """The last text with that name. Raises InvalidRequest, naming the request's `part`, if it is damaged or too long."""
        if name not in self._texts:
            return None
        chunk = self._texts[name]
        if not chunk.is_intact():
            raise InvalidRequest(f"{part}: its text {name} is damaged: the chunk is cut short, or its checksum is wrong", field=part)
        try:
            return _bytes_of(chunk, MAX_TEXT_BYTES).decode("utf-8" if chunk.kind == b"iTXt" else "latin-1")
        except OverflowError:
            raise InvalidRequest(f"{part}: its text {name} is too long, at most {MAX_TEXT_BYTES} bytes are allowed", field=part) from None
        except ValueError:
            raise InvalidRequest(f"{part}: its text {name} is damaged", field=part) from None


def split(content: bytes, part: str) -> Png:
    """Split a PNG file. Raises InvalidRequest, naming the request's `part`, if a chunk that the pixels need is missing or damaged.

    Raises TooLarge for an EXIF block of more than MAX_EXIF_BYTES. Other chunks that are damaged or too large count as missing. Of several
    chunks of one kind, or texts of one name, the last one counts; of chunks that the pixels need, the first one.
    """
    needed, beside, texts = _sorted(content, part)
    header = needed.get(b"IHDR", [None])[0]
    if header is None or len(header.data) < _HEADER_BYTES:
        raise _damaged(part, "its header, the IHDR chunk, is missing or cut short")
    if _PIXELS not in needed:
        raise _damaged(part, "it has no pixels or is cut short before them: there is no IDAT chunk")
    depth, colour_type = header.data[8:10]
    key = _colour_key(needed, colour_type, depth, part)
    if colour_type != _PALETTE:
        needed.pop(b"tRNS", None)
    pixels = [chunk.whole for kind in _NEEDED for chunk in needed.get(kind, ())]
    is_cut_short = needed[_PIXELS][-1].is_cut_short
    file = b"".join((SIGNATURE, *pixels, b"" if is_cut_short else _END))
    return Png(file, depth, key, _exif(beside.get(b"eXIf"), texts.get(_EXIF_TEXT), part), _profile(beside.get(b"iCCP")), texts)


def _sorted(content: bytes, part: str) -> tuple[dict[bytes, list[_Chunk]], dict[bytes, _Chunk], dict[str, _Chunk]]:
    """The chunks that pixels need, others by kind, and texts by name."""
    needed: dict[bytes, list[_Chunk]] = {}
    beside: dict[bytes, _Chunk] = {}
    texts: dict[str, _Chunk] = {}
    for chunk in _chunks(content):
        if chunk.kind == _PIXELS:
            needed.setdefault(_PIXELS, []).append(chunk)
        elif chunk.kind in _NEEDED:
            # After the pixels, or repeated, they have no meaning.
            if _PIXELS in needed or chunk.kind in needed:
                continue
            if not chunk.is_intact():
                raise _damaged(part, f"its {chunk.kind.decode()} chunk is cut short, or its checksum is wrong")
            needed[chunk.kind] = [chunk]
        elif chunk.kind in _TEXTS:
            texts[bytes(chunk.data[:80]).partition(b"\0")[0].decode("latin-1")] = chunk
        elif chunk.is_intact():
            beside[chunk.kind] = chunk
    return needed, beside, texts


def _chunks(content: bytes) -> Iterator[_Chunk]:
    """In the file's order, up to IEND or to the first position where no chunk begins. The last one may be cut short."""
    view, position = memoryview(content), len(SIGNATURE)
    while position + 8 <= len(content):
        (length,) = struct.unpack_from(">I", content, position)
        kind = content[position + 4 : position + 8]
        if kind == b"IEND" or not kind.isalpha():
            return
        end = position + 12 + length
        yield _Chunk(kind, view[position + 8 : position + 8 + length], view[position:end], end > len(content))
        position = end


def _colour_key(needed: Mapping[bytes, list[_Chunk]], colour_type: int, depth: int, part: str) -> tuple[int, ...] | None:
    if b"tRNS" not in needed or colour_type not in _SAMPLES_OF_KEY:
        return None
    count, data = _SAMPLES_OF_KEY[colour_type], needed[b"tRNS"][0].data
    if len(data) < 2 * count:
        raise _damaged(part, "its tRNS chunk, which defines transparency, is too short")
    # Only the lowest `depth` bits of a sample count.
    return tuple(sample & (2**depth - 1) for sample in struct.unpack_from(f">{count}H", data))


def _exif(chunk: _Chunk | None, text: _Chunk | None, part: str) -> bytes | None:
    if chunk is not None:
        block = bytes(chunk.data)
    elif text is not None and text.is_intact():
        block = _block_of_hexadecimal(text, part)
    else:
        return None
    if len(block) > MAX_EXIF_BYTES:
        raise too_large_exif(f"{len(block)}", part)
    return block or None


def too_large_exif(size: str, part: str) -> TooLarge:
    """`size`: the number of bytes, in words."""
    return TooLarge(f"{part}: its EXIF block has {size} bytes, at most {MAX_EXIF_BYTES} are allowed", field=part)


def _block_of_hexadecimal(text: _Chunk, part: str) -> bytes:
    """The block of a text: a line break, "exif", its length, and lines of hexadecimal digits."""
    try:
        lines = _bytes_of(text, 3 * MAX_EXIF_BYTES).split(b"\n", 3)
        return bytes.fromhex(lines[3].decode("ascii")) if len(lines) > 3 else b""
    except OverflowError:
        raise too_large_exif(f"more than {MAX_EXIF_BYTES}", part) from None
    except ValueError:
        return b""


def _profile(chunk: _Chunk | None) -> bytes | None:
    """The ICC profile. None if there is none, or if it is damaged or too large."""
    if chunk is None:
        return None
    _, _, compressed = bytes(chunk.data).partition(b"\0")
    try:
        return _inflated(compressed[1:], MAX_PROFILE_BYTES)
    except (ValueError, OverflowError):
        return None


def _bytes_of(chunk: _Chunk, limit: int) -> bytes:
    """A text without its name, decompressed. Raises ValueError if it is damaged, OverflowError if it has more than `limit` bytes."""
    _, _, rest = bytes(chunk.data).partition(b"\0")
    if chunk.kind == b"zTXt":
        return _inflated(rest[1:], limit)
    is_compressed = False
    if chunk.kind == b"iTXt":
        is_compressed = rest[:1] == b"\1"
        _, _, rest = rest[2:].split(b"\0", 2)  # after the language and the name in that language
    if is_compressed:
        return _inflated(rest, limit)
    if len(rest) > limit:
        raise OverflowError
    return rest


def _inflated(compressed: bytes, limit: int) -> bytes:
    inflater = zlib.decompressobj()
    try:
        inflated = inflater.decompress(compressed, limit + 1)
    except zlib.error as error:
        raise ValueError from error
    if len(inflated) > limit:
        raise OverflowError
    if not inflater.eof:
        raise ValueError
    return inflated


def _damaged(part: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{part}: the PNG is damaged: {reason}", field=part)
