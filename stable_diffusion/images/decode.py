"""Decodes untrusted bytes to a PIL image. Uploads reach only the decoders for PNG, JPEG and WebP.

Also reads the description from an image file without decoding pixels. Does not depend on HTTP, on the model or on torch.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable

from PIL import Image, ImageChops, UnidentifiedImageError

from stable_diffusion.core.errors import InvalidRequest, TooLarge
from stable_diffusion.images.complexity import MAX_EXIF_BYTES, too_many_pieces
from stable_diffusion.images.description import PNG_TEXT, exif_comment

# Pillow's warnings about clients' files do not help the operator, and any client could fill the log with them.
warnings.filterwarnings("ignore", module=r"PIL\.")

MAX_UPLOAD_BYTES = 20 * 2**20
MAX_UPLOAD_PIXELS = 4096 * 4096
MAX_UPLOAD_SIDE = 2**14  # scaling needs 48 bytes per pixel of a side
UPLOADS_IN_WORDS = (
    f"PNG, JPEG or WebP of at most {MAX_UPLOAD_BYTES // 2**20} MiB and {MAX_UPLOAD_PIXELS // 10**6} million pixels, "
    f"{MAX_UPLOAD_SIDE} a side."
)


def read_image(content: bytes, field: str) -> Image.Image:
    """Decode an upload to upright RGB. Transparent areas become white.

    Raises InvalidRequest or TooLarge, naming `field`.
    """
    return _decode(content, field, lambda picture: _flatten(picture, "white").convert("RGB"))


def read_mask(content: bytes, field: str) -> Image.Image:
    """Decode a mask to upright greyscale: white is repainted, black is kept. Transparent areas count as black."""
    return _decode(content, field, lambda picture: _flatten(picture, "black").convert("L"))


def read_transparency_as_mask(content: bytes, field: str) -> Image.Image:
    """Decode a mask whose transparent areas are repainted, to upright greyscale like that of `read_mask`.

    Raises InvalidRequest if nothing is transparent: a black-and-white mask would silently repaint nothing.
    """

    def transparency(picture: Image.Image) -> Image.Image:
        alpha = picture.convert("RGBA").getchannel("A")
        if alpha.getextrema() == (255, 255):
            raise InvalidRequest(f"{field}: nothing in it is transparent; what is to be repainted must have alpha 0", field=field)
        return ImageChops.invert(alpha)

    return _decode(content, field, transparency)


def read_mask_or_opacity(content: bytes, field: str) -> Image.Image:
    """Decode a mask like `read_mask`. If it has transparent areas, its opacity is the mask, whatever its colours."""

    def opacity(picture: Image.Image) -> Image.Image:
        alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
        return picture.convert("L") if alpha is None or alpha.getextrema() == (255, 255) else alpha

    return _decode(content, field, opacity)


def read_description(content: bytes, field: str) -> str | None:
    """The description in an image file: A1111's PNG text "parameters", else the EXIF comment. None if there is neither.

    Reads no pixels. Raises InvalidRequest or TooLarge, naming `field`: in the cases in which `read_image` does, and for text that is
    damaged or too long when decompressed (Pillow stops at 1 MiB per compressed text).
    """
    picture = _open(content, field)
    text = picture.info.get(PNG_TEXT)
    if isinstance(text, str):
        return str(text)
    try:
        return exif_comment(picture.info["exif"]) if picture.info.get("exif") else None
    except ValueError as error:
        raise InvalidRequest(f"{field}: {error}", field=field) from None


def _open(content: bytes, field: str) -> Image.Image:
    """Read only the header, so that a decompression bomb is refused before anything is decoded."""
    if not content:
        raise InvalidRequest(f"{field}: the file is empty, send a PNG, JPEG or WebP image", field=field)
    if len(content) > MAX_UPLOAD_BYTES:
        raise TooLarge(f"{field}: the file has {len(content)} bytes, at most {MAX_UPLOAD_BYTES} are allowed", field=field)
    if reason := too_many_pieces(content):
        raise TooLarge(f"{field}: the file has {reason}", field=field)
    try:
        picture: Image.Image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP"))
    except UnidentifiedImageError:
        raise InvalidRequest(f"{field}: not a PNG, JPEG or WebP image", field=field) from None
    except Image.DecompressionBombError:
        raise TooLarge(f"{field}: the image has more than {MAX_UPLOAD_PIXELS} pixels", field=field) from None
    except _BROKEN_DATA:
        raise InvalidRequest(f"{field}: the image is damaged or cut short, or holds too much text", field=field) from None
    if picture.width * picture.height > MAX_UPLOAD_PIXELS:
        raise TooLarge(
            f"{field}: the image has {picture.width} x {picture.height} pixels, at most {MAX_UPLOAD_PIXELS} in all are allowed",
            field=field,
        )
    if max(picture.size) > MAX_UPLOAD_SIDE:
        raise TooLarge(
            f"{field}: the image has {picture.width} x {picture.height} pixels, at most {MAX_UPLOAD_SIDE} a side are allowed", field=field
        )
    _require_small_exif(picture, field)
    return picture


def _require_small_exif(picture: Image.Image, field: str) -> None:
    """Check the size of the EXIF block. PNG may also hold it as text, and after the pixels."""
    size = max(len(picture.info.get(name, b"")) for name in ("exif", "Raw profile type exif"))
    if size > MAX_EXIF_BYTES:
        raise TooLarge(f"{field}: its EXIF block has {size} bytes, at most {MAX_EXIF_BYTES} are allowed", field=field)


def _decode(content: bytes, field: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    picture = _open(content, field)
    try:
        picture.load()
        _require_small_exif(picture, field)
        turn = _turn(picture)
        converted = convert(_to_8_bit(picture))
        return converted if turn is None else converted.transpose(turn)
    except _BROKEN_DATA:
        raise InvalidRequest(f"{field}: the image is damaged or cut short", field=field) from None


# The errors that Pillow's decoders raise on broken data.
_BROKEN_DATA = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
)

_ORIENTATION = 0x0112
# EXIF 2.32, 4.6.4: orientation -> the transposition that turns the image upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """The transposition that turns the image upright. Many cameras write slightly invalid EXIF; such an image stays as it is.

    ImageOps.exif_transpose would write the whole EXIF block again, and fail on values that it cannot write.
    """
    try:
        return _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
    except _BROKEN_DATA:
        return None


def _to_8_bit(picture: Image.Image) -> Image.Image:
    """Scale 16-bit greyscale down; Pillow's own conversion would clip it to white."""
    if picture.mode.startswith("I"):
        return picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    return picture


def _flatten(picture: Image.Image, backdrop: str) -> Image.Image:
    if not picture.has_transparency_data:
        return picture
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, backdrop), layer)
