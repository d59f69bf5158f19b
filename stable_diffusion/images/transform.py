"""Sizes and masks: choosing an output size, fitting an image or a mask to it, restoring what a mask protects. No file formats."""

from __future__ import annotations

import hashlib
import math

from PIL import Image, ImageOps

from stable_diffusion.core.errors import InvalidRequest
from stable_diffusion.core.limits import MIN_SIDE, SIDE_MULTIPLE

_SAME_PROPORTIONS = 0.02  # a mask painted on a scaled-down image may be off by a pixel


def output_size(
    image_size: tuple[int, int], native_size: tuple[int, int], width: int | None, height: int | None, max_side: int
) -> tuple[int, int]:
    """The (width, height) of the output for an input image.

    Requested sides are kept; a missing one follows from the image's proportions. With neither, the image is fitted
    to the model's native area. Sides that follow are multiples of 8 and at most `max_side`.
    """
    if width is not None and height is not None:
        return width, height
    proportion = image_size[0] / image_size[1]
    if width is not None:
        return width, _allowed_side(width / proportion, max_side)
    if height is not None:
        return _allowed_side(height * proportion, max_side), height
    area = native_size[0] * native_size[1]
    return _allowed_side(math.sqrt(area * proportion), max_side), _allowed_side(math.sqrt(area / proportion), max_side)


def _allowed_side(side: float, max_side: int) -> int:
    return min(max_side, max(MIN_SIDE, round(side / SIDE_MULTIPLE) * SIDE_MULTIPLE))


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale to cover `width` x `height` and crop the rest. Keeps proportions."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def scale_mask(mask: Image.Image, size: tuple[int, int], field: str) -> Image.Image:
    """Scale a mask to its image's size. Raises InvalidRequest if their proportions differ: the mask would cover other areas."""
    if abs(mask.width * size[1] - mask.height * size[0]) > _SAME_PROPORTIONS * mask.width * size[1]:
        raise InvalidRequest(
            f"{field}: {mask.width} x {mask.height} does not have the proportions of the image, {size[0]} x {size[1]}", field=field
        )
    return mask.resize(size, Image.Resampling.BILINEAR)


def digest(image: Image.Image) -> str:
    """Ten hexadecimal digits that identify an image by its pixels."""
    return hashlib.sha256(f"{image.mode} {image.width}x{image.height} ".encode() + image.tobytes()).hexdigest()[:10]


def keep_outside_mask(repainted: Image.Image, original: Image.Image, mask: Image.Image) -> Image.Image:
    """The original where the mask is black, the repainted image where it is white, a blend in between.

    The autoencoder changes every pixel slightly, also those that were not to be repainted.
    """
    return Image.composite(repainted, original, mask)
