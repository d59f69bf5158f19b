"""Bytes to a safe PIL image. No other decoder than those of PNG, JPEG and WebP can be reached by an upload.

Finds what a file says of its picture without decoding it. Knows nothing of what that means, nor of HTTP, of the model or of torch.
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

# What Pillow finds odd in a client's file is of no use to whoever runs the server, and anybody could fill the log with it.
warnings.filterwarnings("ignore", module=r"PIL\.")


MAX_UPLOAD_BYTES = 20 * 2**20
MAX_UPLOAD_PIXELS = 4096 * 4096
MAX_UPLOAD_SIDE = 2**14  # scaling takes 48 bytes for each pixel of a side
UPLOADS_IN_WORDS = (
    f"PNG, JPEG or WebP of at most {MAX_UPLOAD_BYTES // 2**20} MiB and {MAX_UPLOAD_PIXELS // 10**6} million pixels, "
    f"{MAX_UPLOAD_SIDE} a side."
)


def read_image(content: bytes, field: str) -> Image.Image:
    """Decode an upload to upright RGB; what is transparent becomes white.

    Raises InvalidRequest or TooLarge, naming `field`.
    """
    return _decode(content, field, lambda picture: _flatten(picture, "white").convert("RGB"))


def read_mask(content: bytes, field: str) -> Image.Image:
    """Decode a mask to upright greyscale: white is repainted, black is kept. What is transparent counts as black."""
    return _decode(content, field, lambda picture: _flatten(picture, "black").convert("L"))


def read_transparency_as_mask(content: bytes, field: str) -> Image.Image:
    """Decode a mask that says by its transparency what is repainted, to upright greyscale as `read_mask` gives it.

    Raises InvalidRequest if nothing is transparent: a mask in black and white would otherwise repaint nothing.
    """

    def transparency(picture: Image.Image) -> Image.Image:
        alpha = picture.convert("RGBA").getchannel("A")
        if alpha.getextrema() == (255, 255):
            raise InvalidRequest(f"{field}: nothing in it is transparent; what is to be repainted must have alpha 0", field=field)
        return ImageChops.invert(alpha)

    return _decode(content, field, transparency)


def read_mask_or_opacity(content: bytes, field: str) -> Image.Image:
    """Decode a mask as `read_mask`, but where something in it is transparent, what is opaque counts as white, whatever its colour."""

    def opacity(picture: Image.Image) -> Image.Image:
        alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
        return picture.convert("L") if alpha is None or alpha.getextrema() == (255, 255) else alpha

    return _decode(content, field, opacity)


def read_description(content: bytes, field: str) -> str | None:
    """What a picture's file says of it: A1111's PNG text "parameters", else the EXIF comment. None if neither is there.

    Reads no pixel. Raises InvalidRequest or TooLarge, naming `field`: for what `read_picture` refuses too, and for text that is damaged
    or too long once it is unpacked (Pillow stops at 1 MiB of each compressed text).
    """
    picture = _open(content, field)
    text = picture.info.get(PNG_TEXT)
    if isinstance(text, str):
        return str(text)
    try:
        return exif_comment(picture) if picture.info.get("exif") else None
    except _BROKEN_DATA:
        raise InvalidRequest(f"{field}: its EXIF block is damaged", field=field) from None


def _open(content: bytes, field: str) -> Image.Image:
    """Read only the header: a bomb is refused before anything is decoded."""
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
    """PNG may also have it as text, and behind the pixels."""
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


# What Pillow's decoders raise on broken data.
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
# EXIF 2.32, 4.6.4: how a picture is stored, and what sets it upright.
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
    """What sets the picture upright. Many cameras write EXIF that is not quite right; then the picture is taken as it is.

    ImageOps.exif_transpose would write the whole EXIF block again, and fail on what it cannot write.
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
