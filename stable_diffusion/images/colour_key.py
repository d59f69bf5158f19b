"""Handles the one transparent colour of a PNG's tRNS chunk in all depths, and 16-bit greyscale. Pillow compares and scales 8 bits only."""

from __future__ import annotations

import io

from PIL import Image, ImageChops

from stable_diffusion.images.png import Png

_TO_8_BIT = [round(sample / 257) for sample in range(2**16)]


def grey_of_16_bit(image: Image.Image) -> Image.Image:
    """Convert 16-bit greyscale to 8 bits; Pillow's own conversion would clip it to white."""
    return image.convert("I").point(_TO_8_BIT, "L")


def with_alpha_of_key(image: Image.Image, png: Png) -> Image.Image:
    """Convert a decoded grey or RGB image to LA or RGBA, transparent where it has the colour key. `png` is its file, which has a key."""
    key = png.colour_key or ()
    if image.mode == "RGB":
        alpha = _differs_in_16_bit(image, key, png.pixels) if png.depth == 16 else _differs(image, key)
        image.putalpha(alpha)
        return image
    if png.depth == 16:
        alpha = image.convert("I").point([0 if sample == key[0] else 255 for sample in range(2**16)], "L")
        return Image.merge("LA", (grey_of_16_bit(image), alpha))
    grey = image.convert("L")
    return Image.merge("LA", (grey, _differs(grey, (key[0] * 255 // (2**png.depth - 1),))))


def _differs(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Greyscale: 0 where the image has that colour, 255 elsewhere."""
    differing = Image.new("L", image.size)
    for band, level in enumerate(colour):
        other = image.getchannel(band).point([0 if sample == level else 255 for sample in range(256)])
        differing = ImageChops.lighter(differing, other)
    return differing


def _differs_in_16_bit(high: Image.Image, colour: tuple[int, ...], content: bytes) -> Image.Image:
    """Pillow keeps the `high` bytes of 16-bit colours; reading the file in the other byte order yields the low bytes."""
    differing = _differs(high, tuple(sample >> 8 for sample in colour))
    with Image.open(io.BytesIO(content), formats=("PNG",)) as low:
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
        low.load()
        return ImageChops.lighter(differing, _differs(low, tuple(sample & 255 for sample in colour)))
