"""Bytes to a safe PIL image, and a PIL image to PNG, JPEG or WebP. Only these three decoders can be reached.

Knows nothing of HTTP, of the model or of torch.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from typing import Literal

from PIL import Image, ImageOps, UnidentifiedImageError

from stable_diffusion.errors import ImageTooLarge, InvalidRequest
from stable_diffusion.requests import MAX_SIDE, MIN_SIDE, SIDE_MULTIPLE

ImageFormat = Literal["jpeg", "png", "webp"]
MEDIA_TYPES: dict[ImageFormat, str] = {"jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"}

MAX_UPLOAD_BYTES = 20 * 2**20
MAX_UPLOAD_PIXELS = 4096 * 4096
_QUALITY = 95


def read_picture(content: bytes, field: str) -> Image.Image:
    """Decode an upload to upright RGB; what is transparent becomes white.

    Raises InvalidRequest or ImageTooLarge, naming `field`.
    """
    picture = _decode(content, field)
    if _is_transparent(picture):
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return _to_8_bit(picture).convert("RGB")


def read_mask(content: bytes, field: str) -> Image.Image:
    """Decode a mask to upright greyscale: white is repainted, black is kept. What is transparent counts as black."""
    mask = _decode(content, field)
    if _is_transparent(mask):
        layer = mask.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "black"), layer).convert("L")
    return _to_8_bit(mask).convert("L")


def _decode(content: bytes, field: str) -> Image.Image:
    if not content:
        raise InvalidRequest(f"{field}: the file is empty, send a PNG, JPEG or WebP image", field=field)
    if len(content) > MAX_UPLOAD_BYTES:
        raise ImageTooLarge(f"{field}: the file has {len(content)} bytes, at most {MAX_UPLOAD_BYTES} are allowed", field=field)
    try:
        picture = Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP"))
        # Only the header has been read so far: refuse a bomb before anything is decoded.
        if picture.width * picture.height > MAX_UPLOAD_PIXELS:
            raise ImageTooLarge(
                f"{field}: the image has {picture.width} x {picture.height} pixels, at most {MAX_UPLOAD_PIXELS} in all are allowed",
                field=field,
            )
        picture.load()
        return ImageOps.exif_transpose(picture)
    except UnidentifiedImageError:
        raise InvalidRequest(f"{field}: not a PNG, JPEG or WebP image", field=field) from None
    except Image.DecompressionBombError:
        raise ImageTooLarge(f"{field}: the image has more than {MAX_UPLOAD_PIXELS} pixels", field=field) from None
    except (OSError, ValueError, SyntaxError, struct.error, zlib.error, EOFError, OverflowError):
        # Pillow's decoders raise any of these on broken data.
        raise InvalidRequest(f"{field}: the image is damaged or cut short", field=field) from None


def _is_transparent(picture: Image.Image) -> bool:
    return picture.has_transparency_data


def _to_8_bit(picture: Image.Image) -> Image.Image:
    """Scale 16-bit greyscale down; Pillow's own conversion would clip it to white."""
    if picture.mode.startswith("I"):
        return picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    return picture


def output_size(picture_size: tuple[int, int], native_size: tuple[int, int], width: int | None, height: int | None) -> tuple[int, int]:
    """The (width, height) to draw an input picture at.

    Asked for sides are taken as they are, a missing one follows from the picture's proportions. With neither,
    the picture is fitted to the model's native area. Sides are multiples of 8 and within the limits.
    """
    if width is not None and height is not None:
        return width, height
    proportion = picture_size[0] / picture_size[1]
    if width is not None:
        return width, _allowed_side(width / proportion)
    if height is not None:
        return _allowed_side(height * proportion), height
    area = native_size[0] * native_size[1]
    return _allowed_side(math.sqrt(area * proportion)), _allowed_side(math.sqrt(area / proportion))


def _allowed_side(side: float) -> int:
    return min(MAX_SIDE, max(MIN_SIDE, round(side / SIDE_MULTIPLE) * SIDE_MULTIPLE))


def fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Scale to cover `width` x `height` and cut what sticks out: proportions are kept, nothing is squashed."""
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def keep_outside_mask(repainted: Image.Image, original: Image.Image, mask: Image.Image) -> Image.Image:
    """The original where the mask is black, the repainted picture where it is white, a blend in between.

    The autoencoder changes every pixel a little, also those that nobody asked to be repainted.
    """
    return Image.composite(repainted, original, mask)


def encode(picture: Image.Image, image_format: ImageFormat) -> bytes:
    """Encode RGB: JPEG and WebP with quality 95, PNG without loss."""
    buffer = io.BytesIO()
    if image_format == "jpeg":
        picture.save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
    elif image_format == "webp":
        picture.save(buffer, "WEBP", quality=_QUALITY)
    else:
        picture.save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()
