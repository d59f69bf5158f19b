"""Where an image file stores how the image was generated: a PNG text chunk, or the EXIF comment of JPEG and WebP, like A1111.

`infotext.py` defines what the description says.
"""

from __future__ import annotations

import struct

from PIL import Image, PngImagePlugin

PNG_TEXT = "parameters"
_EXIF_FOLDER, _USER_COMMENT = 0x8769, 0x9286
_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}  # of a TIFF block, as `struct` names them
_ENTRY_BYTES = 12
_TEXT_TYPES = (1, 2, 7, 129)  # bytes, ASCII, undefined, and UTF-8 of Exif 3.0: one byte each
_UTF_16 = b"UNICODE\0"
_MARKS = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
BYTE_ORDER_MARK = "\ufeff"


def exif_comment(block: bytes) -> str | None:
    """The UserComment of an EXIF block, whichever encoding its writer used. None if it is missing or empty.

    Raises ValueError, which says what is wrong, if the block is damaged or the comment is not text.
    """
    while block.startswith(b"Exif\0\0"):
        block = block[6:]
    order = _BYTE_ORDERS.get(block[:4])
    if order is None:
        raise ValueError("its EXIF block is damaged: it has no TIFF header")
    try:
        comment = _user_comment(block, order)
    except struct.error:
        raise ValueError("its EXIF block is damaged or cut short") from None
    return _text_of(comment, order).rstrip("\0").lstrip(BYTE_ORDER_MARK) or None


def _user_comment(block: bytes, order: str) -> bytes:
    """The bytes of the comment; empty if there is none."""
    folder = _entry(block, order, struct.unpack_from(f"{order}I", block, 4)[0], _EXIF_FOLDER)
    entry = None if folder is None else _entry(block, order, struct.unpack_from(f"{order}I", block, folder + 8)[0], _USER_COMMENT)
    if entry is None:
        return b""
    kind, length, value = struct.unpack_from(f"{order}HII", block, entry + 2)
    if kind not in _TEXT_TYPES:
        raise ValueError(f"its EXIF comment is not text: its TIFF type is {kind}")
    start = entry + 8 if length <= 4 else value
    if start + length > len(block):
        raise ValueError(f"its EXIF comment is cut short: it should have {length} bytes")
    return block[start : start + length]


def _entry(block: bytes, order: str, folder: int, tag: int) -> int | None:
    """The offset of a TIFF folder's entry for `tag`; None if there is none."""
    (count,) = struct.unpack_from(f"{order}H", block, folder)
    for entry in range(folder + 2, folder + 2 + count * _ENTRY_BYTES, _ENTRY_BYTES):
        if struct.unpack_from(f"{order}H", block, entry)[0] == tag:
            return entry
    return None


def _text_of(comment: bytes, order: str) -> str:
    """EXIF 2.32, 4.6.5, UserComment: eight bytes that name the character code, then the text, in UTF-16 in the block's byte order.

    Programs write UTF-16 in the other order or with a byte order mark, write UTF-8 after "UNICODE" (as Exif 3.0 allows) or "ASCII", or
    omit the code. So the text itself decides: only UTF-16 has zero bytes within.
    """
    code = comment[:8].rstrip(b"\0 ")
    if code == b"JIS":
        raise ValueError("its EXIF comment is in JIS, which is not supported")
    text = comment[8:] if code in (b"", b"ASCII", b"UNICODE") else comment
    marked = [encoding for mark, encoding in _MARKS.items() if text.startswith(mark)]
    has_zeros = b"\0" in text.rstrip(b"\0")
    utf_16 = ["utf-16-le", "utf-16-be"] if order == "<" else ["utf-16-be", "utf-16-le"]
    if marked:
        encodings = marked
    elif code == b"UNICODE":
        encodings = utf_16 if has_zeros else ["utf-8", *utf_16]
    else:
        if has_zeros and _pairs_in(wide := _decoded(text, utf_16) or ""):
            return wide
        text = text.partition(b"\0")[0]  # some programs write leftover memory after it
        encodings = ["utf-8", "latin-1"]
    decoded = _decoded(text, encodings)
    if decoded is None:
        raise ValueError(f"its EXIF comment is damaged: {len(text)} bytes that are not {' or '.join(map(str.upper, encodings))}")
    return decoded


def _decoded(text: bytes, encodings: list[str]) -> str | None:
    """Decode with the encoding that yields the most pairs of an infotext; on a tie, the first. None if no encoding fits."""
    found: list[str] = []
    for encoding in encodings:
        whole = text[: len(text) & ~1] if encoding.startswith("utf-16") else text  # some files have one extra zero byte
        try:
            found.append(whole.decode(encoding))
        except UnicodeDecodeError:
            continue
    return max(found, key=_pairs_in, default=None)


def _pairs_in(text: str) -> int:
    """An upper bound on the pairs of a name and a value; UTF-16 decoded in the wrong order has none."""
    return text.count(": ")


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
