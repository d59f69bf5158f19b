"""The one colour that a PNG's tRNS chunk makes transparent, in every depth, as other programs write and read it."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from stable_diffusion.core.errors import InvalidRequest
from stable_diffusion.images.decode import read_image, read_mask, read_mask_or_opacity, read_transparency_as_mask
from tests.hostile_pictures import GREY, RGB, chunk, png
from tests.programs import imagemagick, pixels_by_imagemagick, pnmtopng

CASES = Path(__file__).parent / "cases"
NEAR = 0x1234, 0x1235, 0x1334, 0xAAFF  # of 16 bits: the second differs from the first in its low byte only, the third in its high one


def grey_by_netpbm(depth: int) -> bytes:
    levels = range(2**depth)
    picture = b"P5\n%d 1\n%d\n%s" % (len(levels), levels[-1], bytes(levels))
    key = 255 // levels[-1]  # level 1
    return pnmtopng("-transparent", f"=rgb:{key:02x}/{key:02x}/{key:02x}", file=picture)


def by_imagemagick(mode: str, colour_type: int, samples: list[int]) -> bytes:
    raw = struct.pack(f">{len(samples)}H", *samples)
    options = ("-define", f"png:color-type={colour_type}", "-define", "png:bit-depth=16")
    return imagemagick(
        "-size", "4x1", "-depth", "16", "-endian", "MSB", f"{mode}:-", "-transparent", "#123412341234", *options, "png:-", file=raw
    )


def made_by_others() -> dict[str, bytes]:
    """One row each; the colour whose samples are 1 (or 0x1234) is transparent."""
    with_others = [sample for level in NEAR for sample in (0x1234, level, 0x1234)]
    return {
        "netpbm, 1 bit": grey_by_netpbm(1),
        "netpbm, 2 bit": grey_by_netpbm(2),
        "netpbm, 4 bit": grey_by_netpbm(4),
        "netpbm, 8 bit": grey_by_netpbm(8),
        "ImageMagick, 16 bit": by_imagemagick("gray", GREY, list(NEAR)),
        "ImageMagick, 16 bit of each colour": by_imagemagick("rgb", RGB, with_others),
    }


def test_what_other_programs_make_transparent_is_transparent() -> None:
    for name, content in made_by_others().items():
        depth, colour_type = content[24:26]
        assert b"tRNS" in content, name
        assert (colour_type, depth) == (RGB if "each" in name else GREY, int(name.split()[1])), name
        opacity = pixels_by_imagemagick(content, "-alpha", "extract", mode="gray")
        assert sorted(set(opacity.ravel())) == [0, 255], name
        assert (np.asarray(read_transparency_as_mask(content, "mask")) == 255 - opacity).all(), name
        assert (np.asarray(read_mask_or_opacity(content, "mask")) == opacity).all(), name
        on_white = pixels_by_imagemagick(content, "-background", "white", "-alpha", "remove")
        assert np.abs(np.asarray(read_image(content, "img")) - on_white).max() <= 1, name
        on_black = pixels_by_imagemagick(content, "-background", "black", "-alpha", "remove", "-grayscale", "Rec601Luma", mode="gray")
        assert np.abs(np.asarray(read_mask(content, "mask")) - on_black).max() <= 1, name


@pytest.mark.parametrize("name", ["mask_4bit_tRNS.png", "mask_rgb16_tRNS.png"])
def test_the_transparent_right_half_of_a_mask_is_repainted(name: str) -> None:
    mask = np.asarray(read_transparency_as_mask((CASES / name).read_bytes(), "mask"))
    assert (mask[:, :32] == 0).all()
    assert (mask[:, 32:] == 255).all()


def test_of_a_key_only_the_bits_of_the_depth_count() -> None:
    content = png(4, 1, 2, GREY, b"\x1b", before=chunk(b"tRNS", b"\xff\xfd"))
    assert list(read_transparency_as_mask(content, "mask").tobytes()) == [0, 255, 0, 0]


def test_interlaced_16_bit_colours_are_compared_in_full() -> None:
    samples = [sample for level in NEAR for sample in (level, level, level)]
    plain = by_imagemagick("rgb", RGB, samples)
    interlaced = imagemagick("-", "-interlace", "PNG", "png:-", file=plain)
    assert (interlaced[28], b"tRNS" in interlaced) == (1, True)
    assert list(read_transparency_as_mask(interlaced, "mask").tobytes()) == [255, 0, 0, 0]


def test_a_colour_that_no_pixel_has_makes_nothing_transparent() -> None:
    content = png(2, 1, 16, RGB, struct.pack(">6H", *[257] * 6), before=chunk(b"tRNS", struct.pack(">3H", 257, 257, 256)))
    with pytest.raises(InvalidRequest, match="^mask: no pixel is transparent"):
        read_transparency_as_mask(content, "mask")
    assert read_image(content, "img").getcolors() == [(2, (1, 1, 1))]
