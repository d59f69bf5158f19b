"""The one colour that a PNG's tRNS chunk makes transparent, in all depths, and 16-bit greyscale. Pillow compares and scales 8 bits only."""

from __future__ import annotations

import io

from PIL import Image, ImageChops

from stable_diffusion.images.png import Png

_TO_8_BIT = [round(sample / 257) for sample in range(2**16)]


def grey_of_16_bit(picture: Image.Image) -> Image.Image:
    """16-bit greyscale in 8 bits; Pillow's own conversion would clip it to white."""
    return picture.convert("I").point(_TO_8_BIT, "L")


def with_alpha_of_key(picture: Image.Image, png: Png) -> Image.Image:
    """A decoded grey or RGB image as LA or RGBA, transparent where its samples are those of the key. `png` is its file, with a key."""
    key = png.colour_key or ()
    if picture.mode == "RGB":
        alpha = _differs_in_16_bit(picture, key, png.pixels) if png.depth == 16 else _differs(picture, key)
        picture.putalpha(alpha)
        return picture
    if png.depth == 16:
        alpha = picture.convert("I").point([0 if sample == key[0] else 255 for sample in range(2**16)], "L")
        return Image.merge("LA", (grey_of_16_bit(picture), alpha))
    grey = picture.convert("L")
    return Image.merge("LA", (grey, _differs(grey, (key[0] * 255 // (2**png.depth - 1),))))


def _differs(picture: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Greyscale: 0 where the picture has that colour, 255 elsewhere."""
    differing = Image.new("L", picture.size)
    for band, level in enumerate(colour):
        other = picture.getchannel(band).point([0 if sample == level else 255 for sample in range(256)])
        differing = ImageChops.lighter(differing, other)
    return differing


def _differs_in_16_bit(high: Image.Image, colour: tuple[int, ...], content: bytes) -> Image.Image:
    """Pillow keeps the `high` bytes of 16-bit colours; read as the other byte order, the file has the low ones."""
    differing = _differs(high, tuple(sample >> 8 for sample in colour))
    with Image.open(io.BytesIO(content), formats=("PNG",)) as low:
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
        low.load()
        return ImageChops.lighter(differing, _differs(low, tuple(sample & 255 for sample in colour)))
