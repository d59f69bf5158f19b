"""Forms as other programs write them: with a preamble, with files that have no filename, with a mail library's line ends."""

from __future__ import annotations

import asyncio
from email import policy
from email.mime.image import MIMEImage
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText

import pytest
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.types import Message

from stable_diffusion.core.errors import InvalidRequest
from stable_diffusion.web import body

PICTURE = b"\x89PNG\r\n\x1a\n\r\n--\r\n--Y\r\n\x00\xff--"
DELIMITER = b"--X"


def part(headers: str, content: bytes) -> bytes:
    return DELIMITER + b"\r\nContent-Disposition: form-data; " + headers.encode() + b"\r\n\r\n" + content + b"\r\n"


DATA = part('name="data"', b'{"prompt": "a"}')
END = DELIMITER + b"--\r\n"
FORM = DATA + part('name="img"; filename="a.png"\r\nContent-Type: image/png', PICTURE) + END


def request(content: bytes, piece_bytes: int, content_type: str) -> Request:
    pieces = [content[begin : begin + piece_bytes] for begin in range(0, len(content), piece_bytes)] or [b""]

    async def receive() -> Message:
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    headers = [(b"content-type", content_type.encode())]
    return Request({"type": "http", "method": "POST", "path": "/img2img", "query_string": b"", "headers": headers}, receive)


def read(content: bytes, piece_bytes: int = 2**16, content_type: str = "multipart/form-data; boundary=X") -> dict[str, bytes | str]:
    """Files as bytes, fields as text."""

    async def whole() -> dict[str, bytes | str]:
        async with body.opened_form(request(content, piece_bytes, content_type), max_images=2, max_parts=8) as form:
            return {name: await one.read() if isinstance(one, UploadFile) else one for name, one in form.multi_items()}

    return asyncio.run(whole())


def cut(value: object) -> str:
    return repr(value)[:60]


SIZES = pytest.mark.parametrize("piece_bytes", [1, 3, 10, 2**16])


@SIZES
@pytest.mark.parametrize(
    "preamble",
    [
        b"",
        b"\r\n",
        b"\r\n\r\n",
        b"This is a message in several parts.\r\n",
        b"Content-Type: multipart/form-data; boundary=X\r\nMIME-Version: 1.0\r\n\r\n",
        b"in the line --X\r\n",
        b"\r\nin a line of its own: -\r\n--\r\n--Y\r\n--Xa\r\n",
        b"\xff\x00" * 5000 + b"\r\n",
    ],
    ids=cut,
)
def test_a_preamble_is_ignored(preamble: bytes, piece_bytes: int) -> None:
    assert read(preamble + FORM, piece_bytes) == {"data": '{"prompt": "a"}', "img": PICTURE}


@SIZES
def test_an_epilogue_is_ignored(piece_bytes: int) -> None:
    assert read(FORM + b"That was all.\r\n" + DATA, piece_bytes) == {"data": '{"prompt": "a"}', "img": PICTURE}


@SIZES
@pytest.mark.parametrize("garbage", [b"garbage", b'{"prompt": "a"}', b"\r\n\r\nfoo", b"a--X\r\n" + FORM[5:20], b"--Y\r\nfoo"], ids=cut)
def test_a_body_without_a_delimiter_is_refused(garbage: bytes, piece_bytes: int) -> None:
    with pytest.raises(InvalidRequest, match="^body: not a valid multipart form: the boundary that Content-Type names does not occur"):
        read(garbage, piece_bytes)


@SIZES
def test_a_delimiter_with_trailing_spaces_is_an_error(piece_bytes: int) -> None:
    with pytest.raises(InvalidRequest, match="^body: not a valid multipart form"):
        read(FORM.replace(b"--X\r\n", b"--X \r\n", 1), piece_bytes)


@SIZES
@pytest.mark.parametrize(
    "headers",
    [
        'name="img"\r\nContent-Type: image/png',
        'name="img"\r\ncontent-type:image/jpeg',
        'name="img"\r\nContent-Type: IMAGE/WEBP; quality=best',
        'name="img"\r\nContent-Type: application/octet-stream',
        'name="img"\r\nContent-Transfer-Encoding: binary\r\nContent-Type: application/octet-stream; x=y',
        "name=img;\r\nContent-Type: image/png",
        "name=\"img\"; filename*=UTF-8''caf%C3%A9.png",
        'name="img"; filename=""\r\nContent-Type: image/png',
        'name="img"; filename="a.png"',
    ],
    ids=cut,
)
def test_a_part_with_an_image_type_is_a_file_even_without_a_filename(headers: str, piece_bytes: int) -> None:
    assert read(part(headers, PICTURE) + DATA + END, piece_bytes) == {"img": PICTURE, "data": '{"prompt": "a"}'}


@pytest.mark.parametrize("content_type", ["text/plain", "text/plain; charset=utf-8", "application/json", "application/octet", ""])
def test_a_part_with_another_type_is_text(content_type: str) -> None:
    headers = f'name="data"\r\nContent-Type: {content_type}' if content_type else 'name="data"'
    assert read(part(headers, b'{"prompt": "a"}') + END) == {"data": '{"prompt": "a"}'}


def test_a_part_without_a_name_is_refused_even_if_it_is_an_image() -> None:
    for headers in ("x=y\r\nContent-Type: image/png", "x=y"):
        with pytest.raises(InvalidRequest, match='"name" must be provided'):
            read(part(headers, PICTURE) + END)
    with pytest.raises(InvalidRequest, match='"name" must be provided'):
        read(b"--X\r\nContent-Type: image/png\r\n\r\n" + PICTURE + b"\r\n" + END)


def test_images_without_filenames_count_towards_the_file_limit() -> None:
    many = part('name="img"\r\nContent-Type: image/png', PICTURE) * 9
    with pytest.raises(InvalidRequest, match="Too many files"):
        read(many + END)


@SIZES
def test_a_form_from_pythons_mail_library_is_read(piece_bytes: int) -> None:
    """The library writes a preamble, and by default no filename."""
    form = MIMEMultipart("form-data", boundary="a=b?c", policy=policy.HTTP)
    form.preamble = "This is a multi-part message in MIME format."
    form.epilogue = "the end"
    image_content = b"\x89PNG\x00\xff--"  # without line ends, which the library changes
    image = MIMEImage(b"", "png", _encoder=lambda message: None, policy=policy.HTTP)
    image.set_payload(image_content.decode("ascii", "surrogateescape"))
    for name, one in (("data", MIMEText('{"prompt": "a"}', policy=policy.HTTP)), ("img", image)):
        one.add_header("Content-Disposition", "form-data", name=name)
        form.attach(one)
    content = form.as_bytes()
    headers, _, content = content.partition(b"\r\n\r\n")
    assert content.startswith(b"This is a multi-part message")
    whole = read(content, piece_bytes, 'multipart/form-data; boundary="a=b?c"')
    assert whole == {"data": '{"prompt": "a"}', "img": image_content}
