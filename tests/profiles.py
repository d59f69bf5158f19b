"""ICC profiles made by hand, for tests: of screens, by primaries and gamma; of printers and odd ones, by a table."""

from __future__ import annotations

import itertools
import struct

_D50 = (0.9642, 1.0, 0.8249)
# Colorants adapted to D50: red, green and blue in XYZ.
DISPLAY_P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))


def _fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A profile of version 2. `tags` are packed elements, their type in front."""
    table, elements = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for name, element in tags.items():
        table += struct.pack(">4sII", name, start + len(elements), len(element))
        elements += element + b"\0" * (-len(element) % 4)
    size = start + len(elements)
    head = struct.pack(">I4sI4s4s4s6H4s", size, b"none", 0x02400000, kind, space, connection, 2026, 1, 1, 0, 0, 0, b"acsp")
    return (head + bytes(28) + _fixed(*_D50)).ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + elements


def _text(words: bytes) -> bytes:
    return b"desc" + bytes(4) + struct.pack(">I", len(words) + 1) + words + b"\0" + bytes(78)


def _gamma(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def curve_of_srgb(points: int = 1024) -> bytes:
    """IEC 61966-2-1's curve as a table of `points`, as Hewlett-Packard's profile has it."""
    shares = [point / (points - 1) for point in range(points)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return b"curv" + bytes(4) + struct.pack(f">I{points}H", points, *(round(share * 65535) for share in linear))


def of_screen(colorants: tuple[tuple[float, float, float], ...], gamma: float = 2.2, beside: dict[bytes, bytes] | None = None) -> bytes:
    """An RGB profile of primaries and one gamma. `beside` are more tags, or others in place of these."""
    xyz = {name: b"XYZ " + bytes(4) + _fixed(*colorant) for name, colorant in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colorants, strict=True)}
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _gamma(gamma))
    return profile(
        b"mntr",
        b"RGB ",
        b"XYZ ",
        {b"desc": _text(b"a screen"), b"wtpt": b"XYZ " + bytes(4) + _fixed(*_D50), **xyz, **curves, **(beside or {})},
    )


def of_grey(gamma: float) -> bytes:
    return profile(
        b"mntr", b"GRAY", b"XYZ ", {b"desc": _text(b"grey"), b"wtpt": b"XYZ " + bytes(4) + _fixed(*_D50), b"kTRC": _gamma(gamma)}
    )


def of_printer(points: int = 3) -> bytes:
    """A CMYK profile with a table of `points` levels of each ink, to Lab in 8 bits."""
    levels = [point / (points - 1) for point in range(points)]
    nodes = bytes(level for inks in itertools.product(levels, repeat=4) for level in _lab(*inks))
    return profile(b"prtr", b"CMYK", b"Lab ", {b"desc": _text(b"a printer"), b"A2B0": table_of_8_bit(4, 3, points, nodes)})


def of_scanner(points: int = 9) -> bytes:
    """An RGB profile with a table to Lab in place of primaries: darker and less colourful than the numbers say, but for white."""
    levels = [point / (points - 1) for point in range(points)]
    nodes = bytes(level for red, green, blue in itertools.product(levels, repeat=3) for level in _lab_of_light(red, green, blue))
    return profile(b"scnr", b"RGB ", b"Lab ", {b"desc": _text(b"a scanner"), b"A2B0": table_of_8_bit(3, 3, points, nodes)})


def _lab_of_light(red: float, green: float, blue: float) -> tuple[int, int, int]:
    light = 0.3 * red + 0.6 * green + 0.1 * blue
    return round(255 * light**1.5), 128 + round(50 * (red - green)), 128 + round(50 * (light - blue))


def _lab(cyan: float, magenta: float, yellow: float, black: float) -> tuple[int, int, int]:
    """Some ink: the levels are invented, but each ink pulls where it should."""
    light = (1 - 0.9 * black) * (1 - 0.45 * cyan) * (1 - 0.5 * magenta) * (1 - 0.1 * yellow)
    colourful = 1 - black
    return (
        round(255 * light),
        128 + round(colourful * (70 * magenta - 35 * cyan)),
        128 + round(colourful * (85 * yellow - 45 * cyan - 5 * magenta)),
    )


def table_of_8_bit(inputs: int, outputs: int, points: int, nodes: bytes) -> bytes:
    """ICC.1:2001, 6.5.8, lut8Type, with straight curves."""
    straight = bytes(range(256))
    head = b"mft1" + bytes(4) + bytes((inputs, outputs, points, 0)) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return head + straight * inputs + nodes + straight * outputs


def of_elements(count: int) -> bytes:
    """A screen whose D2B0 tag lists one table of 33^3 colours `count` times: as many tables to a reader that follows it."""
    table = b"clut" + bytes(4) + struct.pack(">HH", 3, 3) + bytes((33,) * 3).ljust(16, b"\0") + bytes(33**3 * 3 * 4)
    at = 16 + 8 * count
    listed = struct.pack(">II", at, len(table)) * count
    return of_screen(DISPLAY_P3, beside={b"D2B0": b"mpet" + bytes(4) + struct.pack(">HHI", 3, 3, count) + listed + table})
