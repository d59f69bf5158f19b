"""Where an image file stores how the image was generated: a PNG text chunk, or the EXIF comment of JPEG and WebP, like A1111.

`infotext.py` defines what the description says.
"""

from __future__ import annotations

from PIL import Image, PngImagePlugin

PNG_TEXT = "parameters"
_EXIF_FOLDER, _USER_COMMENT = 0x8769, 0x9286
_UTF_16 = b"UNICODE\0"


def exif_comment(picture: Image.Image) -> str | None:
    """EXIF 2.32, 4.6.5, UserComment: eight bytes that name the character code, then the text in the block's byte order."""
    exif = picture.getexif()
    comment = exif.get_ifd(_EXIF_FOLDER).get(_USER_COMMENT)
    if not isinstance(comment, bytes):
        return None
    code, text = comment[:8], comment[8:]
    if code == _UTF_16:
        return text.decode("utf-16-le" if exif.endian == "<" else "utf-16-be")
    return text.decode("ascii") if code == b"ASCII\0\0\0" else None


def as_exif(description: str) -> Image.Exif:
    """Big-endian, as Pillow writes EXIF and as A1111's readers expect the text."""
    exif = Image.Exif()
    exif.get_ifd(_EXIF_FOLDER)[_USER_COMMENT] = _UTF_16 + description.encode("utf-16-be")
    return exif


def as_png_text(description: str) -> PngImagePlugin.PngInfo:
    """As tEXt, or as iTXt if the text does not fit Latin-1."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(PNG_TEXT, description)
    return chunks
