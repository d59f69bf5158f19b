"""Decodes untrusted bytes to a PIL image. Uploads reach only the decoders for PNG, JPEG and WebP.

Also reads the description from an image file without decoding pixels. Does not depend on HTTP, on the model or on torch.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageChops, UnidentifiedImageError

from stable_diffusion.core.errors import InvalidRequest, TooLarge
from stable_diffusion.images.colour import to_srgb
from stable_diffusion.images.colour_key import grey_of_16_bit, with_alpha_of_key
from stable_diffusion.images.complexity import too_many_pieces
from stable_diffusion.images.description import PNG_TEXT, exif_comment
from stable_diffusion.images.png import MAX_EXIF_BYTES, MAX_PROFILE_BYTES, Png, split, too_large_exif
from stable_diffusion.images.png import SIGNATURE as PNG_SIGNATURE

# Pillow's warnings about clients' files do not help the operator, and any client could fill the log with them.
warnings.filterwarnings("ignore", module=r"PIL\.")

MAX_UPLOAD_BYTES = 20 * 2**20
MAX_UPLOAD_PIXELS = 4096 * 4096
MAX_UPLOAD_SIDE = 2**14  # scaling needs 48 bytes per pixel of a side
UPLOADS_IN_WORDS = (
    f"PNG, JPEG or WebP of at most {MAX_UPLOAD_BYTES // 2**20} MiB and {MAX_UPLOAD_PIXELS // 10**6} million pixels, "
    f"{MAX_UPLOAD_SIDE} per side."
)


def read_image(content: bytes, field: str) -> Image.Image:
    """Decode an upload to upright RGB in sRGB. Transparent areas become white.

    Raises InvalidRequest or TooLarge, naming `field`.
    """
    return _decode(content, field, lambda image, profile: _flatten(to_srgb(image, profile), "white").convert("RGB"))


def read_mask(content: bytes, field: str) -> Image.Image:
    """Decode a mask to upright greyscale: white is repainted, black is kept. Transparent areas count as black.

    Like the other mask readers, it ignores colour profiles: the levels of a mask are not colours.
    """
    return _decode(content, field, lambda image, _: _flatten(image, "black").convert("L"))


def read_transparency_as_mask(content: bytes, field: str) -> Image.Image:
    """Decode a mask whose transparent areas are repainted. Returns upright greyscale, like `read_mask`.

    Raises InvalidRequest if nothing is transparent: a black-and-white mask would silently repaint nothing.
    """

    def transparency(image: Image.Image, _: bytes | None) -> Image.Image:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema() == (255, 255):
            raise InvalidRequest(f"{field}: no pixel is transparent; areas to repaint must have alpha 0", field=field)
        return ImageChops.invert(alpha)

    return _decode(content, field, transparency)


def read_mask_or_opacity(content: bytes, field: str) -> Image.Image:
    """Decode a mask like `read_mask`. If it has transparent areas, its opacity is the mask, whatever its colours."""

    def opacity(image: Image.Image, _: bytes | None) -> Image.Image:
        alpha = image.getchannel("A") if image.has_transparency_data else None
        return image.convert("L") if alpha is None or alpha.getextrema() == (255, 255) else alpha

    return _decode(content, field, opacity)


def read_description(content: bytes, field: str) -> str | None:
    """The description in an image file: A1111's PNG text "parameters", else the EXIF comment. None if there is neither.

    Reads no pixels. Raises InvalidRequest or TooLarge, naming `field`, where `read_image` does before it decodes, and for a text or a
    comment that is damaged or too long.
    """
    upload = _open(content, field)
    text = None if upload.png is None else upload.png.text(PNG_TEXT, field)
    if text is not None or upload.exif is None:
        return text
    try:
        return exif_comment(upload.exif)
    except ValueError as error:
        raise InvalidRequest(f"{field}: {error}", field=field) from None


def names_of_texts(content: bytes, field: str) -> list[str]:
    """The names of a PNG file's texts; empty for other files. Raises what `read_description` raises before it looks for a text."""
    upload = _open(content, field)
    return [] if upload.png is None else upload.png.names_of_texts


@dataclass(frozen=True)
class _Upload:
    """A file whose header was read. `png` is None if it is a JPEG or WebP."""

    image: Image.Image
    png: Png | None
    exif: bytes | None
    profile: bytes | None


def _open(content: bytes, field: str) -> _Upload:
    """Read only the header, so that a decompression bomb is refused before anything is decoded."""
    if not content:
        raise InvalidRequest(f"{field}: the file is empty, send a PNG, JPEG or WebP image", field=field)
    if len(content) > MAX_UPLOAD_BYTES:
        raise TooLarge(f"{field}: the file has {len(content)} bytes, at most {MAX_UPLOAD_BYTES} are allowed", field=field)
    if reason := too_many_pieces(content):
        raise TooLarge(f"{field}: the file has {reason}", field=field)
    png = split(content, field) if content.startswith(PNG_SIGNATURE) else None
    image = _opened(content if png is None else png.pixels, field)
    if image.width * image.height > MAX_UPLOAD_PIXELS:
        raise TooLarge(
            f"{field}: the image has {image.width} x {image.height} pixels, at most {MAX_UPLOAD_PIXELS} in total are allowed",
            field=field,
        )
    if max(image.size) > MAX_UPLOAD_SIDE:
        raise TooLarge(
            f"{field}: the image has {image.width} x {image.height} pixels, at most {MAX_UPLOAD_SIDE} per side are allowed", field=field
        )
    if png is not None:
        # `Image.getexif` looks here for the orientation.
        beside = {"exif": png.exif, "xmp": png.xmp}
        image.info.update({name: value for name, value in beside.items() if value})
        return _Upload(image, png, png.exif, png.profile)
    exif, profile = image.info.get("exif"), image.info.get("icc_profile")
    if exif is not None and len(exif) > MAX_EXIF_BYTES:
        raise too_large_exif(f"{len(exif)}", field)
    return _Upload(image, None, exif, profile if profile is not None and len(profile) <= MAX_PROFILE_BYTES else None)


def _opened(content: bytes, field: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP"))
    except UnidentifiedImageError:
        raise InvalidRequest(f"{field}: {_unidentified(content)}", field=field) from None
    except Image.DecompressionBombError:
        raise TooLarge(f"{field}: the image has more than {MAX_UPLOAD_PIXELS} pixels", field=field) from None
    except _BROKEN_DATA:
        raise InvalidRequest(f"{field}: the image is damaged or cut short", field=field) from None


def _unidentified(content: bytes) -> str:
    for beginning, name in ((PNG_SIGNATURE, "PNG"), (b"\xff\xd8\xff", "JPEG")):
        if content.startswith(beginning):
            return f"the {name} is damaged or cut short"
    return "not a PNG, JPEG or WebP image"


def _decode(content: bytes, field: str, convert: Callable[[Image.Image, bytes | None], Image.Image]) -> Image.Image:
    """`convert` gets the image in L, LA, RGB, RGBA or CMYK, and its profile."""
    upload = _open(content, field)
    try:
        upload.image.load()
        turn = _turn(upload.image)
        converted = convert(_to_8_bit(upload), upload.profile)
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


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The transposition that turns the image upright. Many cameras write slightly invalid EXIF; such an image is not turned.

    ImageOps.exif_transpose would write the whole EXIF block again, and fail on values that it cannot write.
    """
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except _BROKEN_DATA:
        return None


def _to_8_bit(upload: _Upload) -> Image.Image:
    """Convert a palette to colours, 1-bit and 16-bit greyscale to 8-bit greyscale, and a colour key to alpha."""
    image = upload.image
    if upload.png is not None and upload.png.colour_key is not None:
        return with_alpha_of_key(image, upload.png)
    if image.mode == "P":
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    return grey_of_16_bit(image) if image.mode.startswith("I") else image.convert("L") if image.mode == "1" else image


def _flatten(image: Image.Image, backdrop: str) -> Image.Image:
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, backdrop), layer)
