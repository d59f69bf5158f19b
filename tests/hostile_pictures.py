"""Files that no reader of pictures may stumble over: bombs, damaged, cut, odd, of other formats, of two formats at once.

Run as a program, it has every reader of `images.py` read them all, in a bounded address space, and prints what became of each, as JSON
lines.
"""

from __future__ import annotations

import io
import json
import random
import resource
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw

from tests import profiles

Expected = Literal["read", "refused", "either"]

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # PNG's colour types
_CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
_PNG = b"\x89PNG\r\n\x1a\n"
_CUTS = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
_FLIPS_OF_EACH = 10
_MI = 2**20
_MAX_ADDRESS_SPACE = 2 * 2**30


@dataclass(frozen=True)
class Case:
    name: str
    content: bytes
    expected: Expected


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, pixels: bytes, *, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG made by hand. `pixels` are rows of samples, each row whole bytes; `before` and `after` are chunks around the pixels."""
    row = len(pixels) // height
    rows = b"".join(b"\0" + pixels[start : start + row] for start in range(0, len(pixels), row))
    return _png_of_rows(width, height, depth, colour, rows, before=before, after=after)


def flat_png(width: int, height: int, depth: int, colour: int, *, before: bytes = b"", after: bytes = b"") -> bytes:
    """All samples 0, so that any size packs into a few kilobytes."""
    rows = bytes(height * (1 + (width * _CHANNELS[colour] * depth + 7) // 8))
    return _png_of_rows(width, height, depth, colour, rows, before=before, after=after)


def header_only_png(width: int, height: int) -> bytes:
    return _png_of_rows(width, height, 8, RGB, b"")


def interlaced_png(side: int) -> bytes:
    """Adam7, all samples 0."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    size = 0
    for left, top, across, down in passes:
        size += len(range(top, side, down)) * (1 + 3 * len(range(left, side, across)))
    return _png_of_rows(side, side, 8, RGB, bytes(size), interlaced=True)


def _png_of_rows(
    width: int, height: int, depth: int, colour: int, rows: bytes, *, before: bytes = b"", after: bytes = b"", interlaced: bool = False
) -> bytes:
    """`rows` as they are packed, a filter's number before each."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced))
    return _PNG + chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(rows, 9)) + after + chunk(b"IEND", b"")


def file(picture: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def drawing(mode: str = "RGB") -> Image.Image:
    """Something with edges and colours, so that damage shows."""
    picture = Image.frombytes("RGB", (24, 16), random.Random(1).randbytes(24 * 16 * 3)).resize((96, 64))
    ImageDraw.Draw(picture).ellipse((10, 10, 60, 50), fill=(220, 35, 40))
    if mode in ("LA", "RGBA"):
        alpha = Image.linear_gradient("L").resize(picture.size)
        picture = picture.convert(mode)
        picture.putalpha(alpha)
        return picture
    return picture.convert(mode)


def segment(marker: int, data: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def riff(*chunks: bytes, size: int | None = None) -> bytes:
    content = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(content) if size is None else size) + content


def riff_chunk(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def vp8x(width: int, height: int, flags: int = 0) -> bytes:
    return riff_chunk(b"VP8X", bytes((flags, 0, 0, 0)) + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3])


def tiff_block(*entries: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block of entries (tag, type, count, four bytes of value or offset)."""
    listed = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + listed + b"\0\0\0\0"


def whole_files() -> dict[str, bytes]:
    """What is right and must be read, in every mode that the formats have."""
    files = {f"png grey {depth} bit": flat_png(16, 16, depth, GREY) for depth in (1, 2, 4, 8, 16)}
    files |= {f"png palette {depth} bit": flat_png(16, 16, depth, PALETTE, before=_palette(depth)) for depth in (1, 2, 4, 8)}
    files |= {
        f"png palette {depth} bit with transparency": flat_png(
            16, 16, depth, PALETTE, before=_palette(depth) + chunk(b"tRNS", bytes(range(2**depth)))
        )
        for depth in (1, 2, 4, 8)
    }
    files |= {
        f"png {name} {depth} bit": flat_png(16, 16, depth, colour)
        for name, colour in (("rgb", RGB), ("grey and alpha", GREY_ALPHA), ("rgba", RGBA))
        for depth in (8, 16)
    }
    files |= {
        f"png grey {depth} bit with transparency": flat_png(16, 16, depth, GREY, before=chunk(b"tRNS", b"\0\0"))
        for depth in (1, 2, 4, 8, 16)
    }
    files |= {f"png rgb {depth} bit with transparency": flat_png(16, 16, depth, RGB, before=chunk(b"tRNS", bytes(6))) for depth in (8, 16)}
    files |= {f"png of Pillow, {mode}": file(drawing(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")}
    files |= {f"jpeg {mode}": file(drawing(mode), "JPEG") for mode in ("L", "RGB", "CMYK")}
    files |= {
        "png interlaced": interlaced_png(33),
        "jpeg progressive": file(drawing(), "JPEG", progressive=True),
        "jpeg subsampled": file(drawing(), "JPEG", subsampling="4:2:0", quality=30),
        "jpeg with restart markers": file(drawing(), "JPEG", restart_marker_blocks=4),
        "jpeg progressive cmyk": file(drawing("CMYK"), "JPEG", progressive=True),
        "webp lossy": file(drawing(), "WEBP"),
        "webp lossless": file(drawing(), "WEBP", lossless=True),
        "webp with alpha": file(drawing("RGBA"), "WEBP"),
        "webp animated": file(drawing(), "WEBP", save_all=True, append_images=[drawing()] * 3),
        "png animated": file(drawing(), "PNG", save_all=True, append_images=[drawing("RGBA").convert("RGB")] * 3),
        "mpo": file(drawing(), "MPO", save_all=True, append_images=[drawing()]),
    }
    return files


def _palette(depth: int) -> bytes:
    return chunk(b"PLTE", bytes(index % 256 for index in range(3 * 2**depth)))


def corpus() -> Iterator[Case]:
    whole = whole_files()
    yield from (Case(name, content, "read") for name, content in whole.items())
    yield from _damaged(whole)
    yield from _wrong_lengths(whole)
    yield from _bombs(whole)
    yield from _profiles()
    yield from _damaged_beside_pixels(whole["png of Pillow, RGB"])
    yield from _animations()
    yield from _exif(whole["jpeg RGB"])
    yield from _other_formats()
    yield from _polyglots(whole)


def _damaged(whole: dict[str, bytes]) -> Iterator[Case]:
    dice = random.Random(2)
    for name in (
        *("png of Pillow, RGBA", "png of Pillow, P", "png rgb 16 bit", "png interlaced", "png animated"),
        *("jpeg RGB", "jpeg progressive", "jpeg CMYK", "mpo"),
        *("webp lossy", "webp lossless", "webp with alpha", "webp animated"),
    ):
        content = whole[name]
        for cut in _CUTS:
            # What is cut off an animation or an MPO may be another frame.
            yield Case(f"{name}, {cut:.0%} of it", content[: int(len(content) * cut)], "either" if cut > 0.2 else "refused")
        for number in range(_FLIPS_OF_EACH):
            flipped = bytearray(content)
            # Half of them near the start, where headers are.
            reach = 80 if number % 2 else len(flipped)
            for _ in range(dice.randint(1, 8)):
                flipped[dice.randrange(min(reach, len(flipped)))] = dice.randrange(256)
            yield Case(f"{name}, flipped {number}", bytes(flipped), "either")
        inserted = len(content) // 2
        yield Case(f"{name}, zeros within", content[:inserted] + bytes(1000) + content[inserted:], "either")


def _damaged_beside_pixels(plain: bytes) -> Iterator[Case]:
    """Wrong checksums: of chunks that pixels need, and of others."""
    data = plain.index(b"IDAT") - 4
    for kind in (b"pHYs", b"gAMA", b"eXIf", b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"acTL", b"fcTL", b"sPLT", b"xxXx"):
        for name, content in (("empty", b""), ("of zeros", bytes(26)), ("of 300 bytes", bytes(range(50)) * 6)):
            broken = chunk(kind, content)[:-1] + b"?"
            yield Case(f"png, {kind.decode()} {name}, a wrong checksum", plain[:data] + broken + plain[data:], "read")
            yield Case(f"png, {kind.decode()} {name} behind the pixels, a wrong checksum", plain[:-12] + broken + plain[-12:], "read")
    for kind in (b"PLTE", b"tRNS"):
        yield Case(f"png, {kind.decode()}, a wrong checksum", plain[:data] + chunk(kind, bytes(6))[:-1] + b"?" + plain[data:], "refused")
    yield Case("png, tRNS too short", plain[:data] + chunk(b"tRNS", bytes(5)) + plain[data:], "refused")
    yield Case("png, IHDR, a wrong checksum", plain[:29] + b"????" + plain[33:], "refused")


def _wrong_lengths(whole: dict[str, bytes]) -> Iterator[Case]:
    plain = whole["png of Pillow, RGB"]
    data = plain.index(b"IDAT") - 4
    for length in (0, 1, 2**31 - 1, 2**31, 2**32 - 1):
        yield Case(f"png, IDAT of {length} bytes", plain[:data] + struct.pack(">I", length) + plain[data + 4 :], "either")
        yield Case(f"png, IHDR of {length} bytes", plain[:8] + struct.pack(">I", length) + plain[12:], "refused")
    jpeg = whole["jpeg RGB"]
    for length in (0, 1, 2, 0xFFFF):
        for kind in (0xDB, 0xC0, 0xC4, 0xDA, 0xE0):
            start = jpeg.index(bytes((0xFF, kind)))
            changed = jpeg[: start + 2] + struct.pack(">H", length) + jpeg[start + 4 :]
            yield Case(f"jpeg, segment {kind:X} of {length} bytes", changed, "either")
    webp = whole["webp lossy"]
    for length in (0, 1, 2**31, 2**32 - 1):
        yield Case(f"webp, RIFF of {length} bytes", webp[:4] + struct.pack("<I", length) + webp[8:], "either")
        yield Case(f"webp, VP8 of {length} bytes", webp[:16] + struct.pack("<I", length) + webp[20:], "either")


def _bombs(whole: dict[str, bytes]) -> Iterator[Case]:
    for width, height in ((65_535, 65_535), (2**31 - 1, 2**31 - 1), (1, 2**24 + 1), (4097, 4096), (13_000, 13_000), (10_000, 8000), (0, 0)):
        yield Case(f"png of {width} x {height} in its header", header_only_png(width, height), "refused")
    for colour in (GREY, RGB, RGBA):
        for depth in (8, 16):
            yield Case(f"png, the largest, type {colour} of {depth} bit", flat_png(4096, 4096, depth, colour), "read")
    for depth, colour in ((4, GREY), (16, GREY), (8, RGB), (16, RGB)):
        key = chunk(b"tRNS", bytes(6 if colour == RGB else 2))
        yield Case(
            f"png, the largest, type {colour} of {depth} bit with a colour key", flat_png(4096, 4096, depth, colour, before=key), "read"
        )
    for width, height in ((2**24, 1), (1, 2**24), (2**14 + 1, 1)):
        yield Case(f"png of {width} x {height}", flat_png(width, height, 8, GREY), "refused")
    for width, height in ((2**14, 1024), (1, 2**14)):
        yield Case(f"png of {width} x {height}, the longest", flat_png(width, height, 8, GREY), "read")
    sizes = whole["jpeg RGB"].index(b"\xff\xc0") + 5
    for width, height in ((65_535, 65_535), (65_500, 1000), (20_000, 20_000), (0, 0)):
        changed = whole["jpeg RGB"][:sizes] + struct.pack(">HH", height, width) + whole["jpeg RGB"][sizes + 4 :]
        yield Case(f"jpeg of {width} x {height} in its header", changed, "refused")
    for width, height in ((16_383, 16_383), (2**24, 2**24), (2**24, 1), (10_000, 10_000)):
        yield Case(f"webp of {width} x {height} in its header", riff(vp8x(width, height), whole["webp lossy"][12:]), "refused")
    lossless = struct.pack("<I", (16_384 - 1) | (16_384 - 1) << 14)
    yield Case("webp, lossless, of 16384 x 16384", riff(riff_chunk(b"VP8L", b"\x2f" + lossless + bytes(100))), "refused")

    huge = zlib.compress(bytes(200 * _MI), 9)
    texts = {
        b"zTXt": b"parameters\0\0" + huge,
        b"iTXt": b"parameters\0\1\0en\0parameters\0" + huge,
        b"iCCP": b"profile\0\0" + huge,
    }
    for kind, content in texts.items():
        yield Case(f"png, {kind.decode()} of 200 MiB before the pixels", flat_png(8, 8, 8, RGB, before=chunk(kind, content)), "read")
        yield Case(f"png, {kind.decode()} of 200 MiB behind the pixels", flat_png(8, 8, 8, RGB, after=chunk(kind, content)), "read")
    many = chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(_MI - 1), 9)) * 1000
    yield Case("png, a thousand texts of 1 MiB", flat_png(8, 8, 8, RGB, before=many), "read")
    yield Case("png, a thousand texts of 1 MiB behind the pixels", flat_png(8, 8, 8, RGB, after=many), "read")
    yield Case("png, a text of 19 MiB", flat_png(8, 8, 8, RGB, before=chunk(b"tEXt", b"parameters\0" + b"x" * 19 * _MI)), "either")

    yield Case("png, a million empty chunks", flat_png(8, 8, 8, RGB, before=chunk(b"aaAa", b"") * 10**6), "refused")
    yield Case("png, a million empty pieces of pixels", flat_png(8, 8, 8, RGB, before=chunk(b"IDAT", b"") * 10**6), "refused")
    yield Case("png, a million chunks behind the pixels", flat_png(8, 8, 8, RGB, after=chunk(b"aaAa", b"") * 10**6), "refused")
    jpeg = whole["jpeg RGB"]
    yield Case("jpeg, a million empty segments", with_segments(jpeg, segment(0xE5, b"") * 10**6), "refused")
    yield Case("jpeg, a million segments behind an end", with_segments(jpeg, b"\xff\xd9", segment(0xE5, b"") * 10**6), "refused")
    yield Case("jpeg, 4 MiB of fill bytes", with_segments(jpeg, b"\xff" * 4 * _MI), "refused")
    yield Case("jpeg, 4 MiB between segments", with_segments(jpeg, segment(0xE5, b""), bytes(4 * _MI)), "refused")
    yield Case("jpeg, 4 MiB in segments of no known kind", with_segments(jpeg, segment(0xF3, bytes(65_000)) * 64), "refused")
    yield Case("jpeg, 15 MiB of ICC profile", with_segments(jpeg, segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(65_000)) * 240), "either")
    yield Case("jpeg, 15 MiB of comments", with_segments(jpeg, segment(0xFE, bytes(65_000)) * 240), "read")
    for side in (64, 4096):
        progressive = file(Image.new("L", (side, side), 100), "JPEG", progressive=True)
        scan = progressive[progressive.rindex(b"\xff\xda") : -2]
        yield Case(f"jpeg of {side} pixels, 100,000 scans", progressive[:-2] + scan * 100_000 + b"\xff\xd9", "refused")
        yield Case(f"jpeg of {side} pixels, 50 scans", progressive[:-2] + scan * 50 + b"\xff\xd9", "either")


def _profiles() -> Iterator[Case]:
    """None of them is an error: what cannot be used is ignored."""
    dice = random.Random(3)
    whole = {"RGB": profiles.of_screen(profiles.DISPLAY_P3), "L": profiles.of_grey(1.8), "CMYK": profiles.of_printer()}
    for mode, side in (("RGB", 4096), ("L", 4096), ("CMYK", 4096)):
        largest = Image.new(mode, (side, side), 77)
        yield Case(f"jpeg, the largest, {mode} with a profile", file(largest, "JPEG", icc_profile=whole[mode]), "read")
    layers = file(Image.new("RGBA", (4096, 4096), (200, 90, 30, 128)), "PNG", icc_profile=whole["RGB"])
    yield Case("png, the largest, RGBA with a profile", layers, "read")
    for mode, content in whole.items():
        for number in range(_FLIPS_OF_EACH):
            flipped = bytearray(content)
            for _ in range(dice.randint(1, 8)):
                flipped[dice.randrange(min(300 if number % 2 else len(flipped), len(flipped)))] = dice.randrange(256)
            yield Case(f"jpeg {mode}, a profile flipped {number}", file(drawing(mode), "JPEG", icc_profile=bytes(flipped)), "read")
        for cut in (0, 1, 100, 128, 132, 151, len(content) // 2):
            yield Case(f"jpeg {mode}, {cut} bytes of a profile", file(drawing(mode), "JPEG", icc_profile=content[:cut]), "read")
    odd = {
        "a table of 3000 tables": profiles.of_elements(3000),
        "4,294,967,295 tags": whole["RGB"][:128] + b"\xff" * 4 + whole["RGB"][132:],
        "a table of 255 levels that is not there": profiles.profile(
            b"prtr", b"CMYK", b"Lab ", {b"A2B0": profiles.table_of_8_bit(4, 3, 255, b"")}
        ),
        "a table of 16 inks": profiles.profile(b"prtr", b"FCLR", b"Lab ", {b"A2B0": profiles.table_of_8_bit(16, 16, 2, bytes(_MI))}),
        "text": b"<?php system($_GET['c']); ?>" * 50,
    }
    for name, content in odd.items():
        for mode in ("RGB", "CMYK"):
            yield Case(f"jpeg {mode}, a profile of {name}", file(drawing(mode), "JPEG", icc_profile=content), "read")
        yield Case(f"webp, a profile of {name}", file(drawing(), "WEBP", icc_profile=content), "read")
        yield Case(f"png, a profile of {name}", file(drawing(), "PNG", icc_profile=content), "read")
    yield Case("webp, a profile of 15 MiB", file(drawing(), "WEBP", icc_profile=whole["RGB"] + bytes(15 * _MI)), "read")
    yield Case("jpeg CMYK, a profile of 3.5 MB", file(drawing("CMYK"), "JPEG", icc_profile=profiles.of_printer(33)), "read")


def _animations() -> Iterator[Case]:
    frame = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 8, 8, 0, 0, 1, 10, 0, 0))
    pixels = zlib.compress(b"".join(b"\0" + bytes(24) for _ in range(8)))
    frames = b"".join(
        chunk(b"fcTL", struct.pack(">IIIIIHHBB", 2 * number + 1, 8, 8, 0, 0, 1, 10, 0, 0))
        + chunk(b"fdAT", struct.pack(">I", 2 * number + 2) + pixels)
        for number in range(5000)
    )
    announced = chunk(b"acTL", struct.pack(">II", 5001, 0))
    yield Case("png of 5000 frames", flat_png(8, 8, 8, RGB, before=announced + frame, after=frames), "read")
    yield Case("png of 5000 frames, the first one apart", flat_png(8, 8, 8, RGB, before=announced, after=frames), "read")
    for count in (0, 1, 2**31, 2**32 - 1):
        claimed = chunk(b"acTL", struct.pack(">II", count, 0))
        yield Case(f"png that claims {count} frames", flat_png(8, 8, 8, RGB, before=claimed + frame), "either")
    outside = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 60_000, 60_000, 4, 4, 1, 10, 0, 0))
    yield Case("png with a frame larger than itself", flat_png(8, 8, 8, RGB, before=announced + outside, after=frames[:400]), "either")
    two = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    yield Case("webp of 1000 frames", file(two[0], "WEBP", save_all=True, append_images=two * 500, duration=10), "read")
    huge_frame = riff_chunk(b"ANMF", bytes(6) + struct.pack("<I", 2**24 - 1)[:3] * 2 + bytes(4) + riff_chunk(b"VP8L", b"\x2f" + bytes(40)))
    yield Case("webp with a frame larger than itself", riff(vp8x(8, 8, 2), riff_chunk(b"ANIM", bytes(6)), huge_frame), "refused")


def _exif(jpeg: bytes) -> Iterator[Case]:
    def exif_of(block: bytes) -> bytes:
        return with_segments(jpeg, *(segment(0xE1, b"Exif\0\0" + block[start : start + 65_000]) for start in range(0, len(block), 65_000)))

    orientation = (0x0112, 3, 1, b"\6\0\0\0")
    blocks = {
        "no entries": tiff_block(),
        "an orientation of 99": tiff_block((0x0112, 3, 1, b"\x63\0\0\0")),
        "an orientation as text": tiff_block((0x0112, 2, 4, b"six\0")),
        "an orientation out of the block": tiff_block((0x0112, 3, 9, b"\xff\xff\xff\xff")),
        "a count of 4,294,967,295": tiff_block((0x0112, 5, 2**32 - 1, b"\x08\0\0\0")),
        "all entries at once": tiff_block(*((tag, 7, 60_000, b"\x08\0\0\0") for tag in range(0x8000, 0x8000 + 5000))),
        "folders within themselves": tiff_block(orientation, (0x8769, 4, 1, b"\x08\0\0\0"), (0x8825, 4, 1, b"\x08\0\0\0")),
        "a resolution that is divided by zero": tiff_block((0x011A, 5, 1, b"\0\0\0\0"), (0x0128, 3, 1, b"\2\0\0\0")),
        "big-endian nonsense": b"MM\0*" + b"\xff" * 400,
        "only its name": b"",
        "text": b"<?php system($_GET['c']); ?>" * 50,
        "a comment without an end": tiff_block((0x8769, 4, 1, b"\x1a\0\0\0")) + struct.pack("<HHHI", 1, 0x9286, 7, 10**6) + b"\0\0\0\0",
    }
    for name, block in blocks.items():
        yield Case(f"jpeg, EXIF with {name}", with_segments(jpeg, segment(0xE1, b"Exif\0\0" + block[:65_000])), "either")
        yield Case(f"png, EXIF with {name}", flat_png(8, 8, 8, RGB, before=chunk(b"eXIf", block)), "either")
        extended = riff(vp8x(96, 64, 8), file(drawing(), "WEBP")[12:], riff_chunk(b"EXIF", b"Exif\0\0" + block))
        yield Case(f"webp, EXIF with {name}", extended, "either")
    fractions = tiff_block((0x0112, 5, 10**5, b"\x1a\0\0\0")) + b"\1\0\0\0\2\0\0\0" * 10**5
    yield Case("jpeg, EXIF of 0.8 MiB, all of it one value", exif_of(fractions), "either")
    yield Case("jpeg, EXIF of 15 MiB", exif_of(fractions + bytes(15 * _MI)), "refused")
    yield Case("png, EXIF of 15 MiB", flat_png(8, 8, 8, RGB, before=chunk(b"eXIf", bytes(15 * _MI))), "refused")
    yield Case("png, EXIF of 15 MiB behind the pixels", flat_png(8, 8, 8, RGB, after=chunk(b"eXIf", bytes(15 * _MI))), "either")
    as_text = b"Raw profile type exif\0\nexif\n999\n" + b"45786966" * _MI
    yield Case("png, EXIF of 8 MiB as text", flat_png(8, 8, 8, RGB, before=chunk(b"tEXt", as_text)), "refused")
    yield Case("webp, EXIF of 15 MiB", riff(vp8x(96, 64, 8), file(drawing(), "WEBP")[12:], riff_chunk(b"EXIF", bytes(15 * _MI))), "refused")


def _other_formats() -> Iterator[Case]:
    formats = (
        "GIF",
        "BMP",
        "DIB",
        "TIFF",
        "ICO",
        "ICNS",
        "PPM",
        "TGA",
        "PCX",
        "DDS",
        "QOI",
        "SGI",
        "MSP",
        "JPEG2000",
        "AVIF",
        "PDF",
        "EPS",
    )
    for image_format in formats:
        mode = "1" if image_format == "MSP" else "RGB"
        yield Case(f"a {image_format} file", file(drawing(mode), image_format), "refused")
    texts = {
        "nothing": b"",
        "a zero": b"\0",
        "zeros": bytes(100_000),
        "a PSD file": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(100),
        "an SVG file": b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "a PostScript program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(/etc/passwd) (r) file",
        "an MVG script": b"push graphic-context\nviewbox 0 0 640 480\nfill 'url(https://127.0.0.1/x.jpg|ls)'\n",
        "an HTML page": b"<!doctype html><script>alert(1)</script>",
        "a pickle": b"cos\nsystem\n(S'true'\ntR.",
        "the beginning of a PNG": _PNG,
        "the beginning of a JPEG": b"\xff\xd8\xff",
        "the beginning of a WebP": b"RIFF\x10\0\0\0WEBPVP8 ",
        "an empty WebP": riff(),
        "a WAV file": b"RIFF\x24\0\0\0WAVEfmt " + bytes(28),
        "a MNG file": b"\x8aMNG\r\n\x1a\n" + bytes(100),
        "a gzip": zlib.compress(bytes(1000), wbits=31),
    }
    yield from (Case(name, content, "refused") for name, content in texts.items())


def _polyglots(whole: dict[str, bytes]) -> Iterator[Case]:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("x.txt", "x" * 1000)
    other = {
        "a ZIP": packed.getvalue(),
        "a GIF": file(drawing("P"), "GIF"),
        "a PDF": file(drawing(), "PDF"),
        "a script": b"<?php system($_GET['c']); ?>",
        "PostScript": b"%!PS\n(/etc/passwd) (r) file\n",
    }
    for picture in ("png of Pillow, RGB", "jpeg RGB", "webp lossy"):
        for name, content in other.items():
            yield Case(f"{picture}, behind it {name}", whole[picture] + content, "read")
            yield Case(f"{picture}, before it {name}", content + whole[picture], "refused")
    yield Case("a png behind a jpeg's comment", with_segments(whole["jpeg RGB"], segment(0xFE, whole["png grey 8 bit"])), "read")
    yield Case("a jpeg within a png's chunk", flat_png(8, 8, 8, RGB, before=chunk(b"aaAa", whole["jpeg RGB"])), "read")
    yield Case("a picture within a data URL", b"data:image/png;base64,iVBORw0KGgo=", "refused")


def _peak_mib() -> int:
    """Not getrusage's, which keeps the peak of the process that started this one."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) // 2**10


def main() -> None:
    """Each case through each reader; a line for each: what became of it, and in how many seconds of computing. Then the peak memory."""
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_ADDRESS_SPACE, _MAX_ADDRESS_SPACE))
    from stable_diffusion.core.errors import InvalidRequest, TooLarge
    from stable_diffusion.images import decode

    readers = (
        decode.read_image,
        decode.read_mask,
        decode.read_transparency_as_mask,
        decode.read_mask_or_opacity,
        decode.read_description,
    )
    for case in corpus():
        for reader in readers:
            started_s = time.process_time()
            try:
                found = reader(case.content, "img")
                outcome = found.mode if isinstance(found, Image.Image) else "description"
            except (InvalidRequest, TooLarge) as error:
                outcome = f"refused: {error.message}"
            except BaseException as error:
                outcome = f"raised: {error!r}"
            taken_s = time.process_time() - started_s
            line = {"case": case.name, "expected": case.expected, "reader": reader.__name__, "outcome": outcome, "taken_s": taken_s}
            sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.write(json.dumps({"peak_mib": _peak_mib()}) + "\n")


if __name__ == "__main__":
    main()
