"""Encodes a PIL image as PNG, JPEG or WebP, optionally with a description of how it was generated."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image, PngImagePlugin

from stable_diffusion.core.types import ImageFormat
from stable_diffusion.images.colour import SRGB_PROFILE
from stable_diffusion.images.description import as_exif, as_png_text

MEDIA_TYPES: dict[ImageFormat, str] = {"jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
_QUALITY = 95
_PERCEPTUAL = b"\0"  # the rendering intent, which an `sRGB` chunk must name


def encode(image: Image.Image, image_format: ImageFormat, description: str | None = None, quality: int | None = None) -> bytes:
    """Encode RGB in sRGB: JPEG and WebP with a quality of 0 to 100 (None: 95), PNG lossless.

    The description is stored where A1111 stores it and does not change the pixels. The file says that it is sRGB: PNG by its `sRGB`
    chunk of 13 bytes, which browsers and libpng have supported longer than `cICP`; JPEG and WebP by a profile of 588 bytes, since few
    programs look at EXIF's ColorSpace.
    """
    quality = _QUALITY if quality is None else quality
    buffer = io.BytesIO()
    if image_format == "png":
        chunks = PngImagePlugin.PngInfo() if description is None else as_png_text(description)
        chunks.add(b"sRGB", _PERCEPTUAL)
        image.save(buffer, "PNG", compress_level=4, pnginfo=chunks)
        return buffer.getvalue()
    beside: dict[str, Any] = {"icc_profile": SRGB_PROFILE} | ({} if description is None else {"exif": as_exif(description)})
    if image_format == "jpeg":
        image.save(buffer, "JPEG", quality=quality, subsampling=0, **beside)
    else:
        image.save(buffer, "WEBP", quality=quality, **beside)
    return buffer.getvalue()


def encode_preview(preview: Image.Image, size: tuple[int, int], image_format: ImageFormat = "jpeg") -> bytes:
    """Scale a preview, an eighth of the image's size, up to `size` and encode it."""
    return encode(preview.resize(size, Image.Resampling.BICUBIC), image_format)
