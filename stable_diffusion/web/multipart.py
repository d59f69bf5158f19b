"""Reads multipart forms as RFC 7578 and RFC 2046 define them; Starlette and python-multipart alone are stricter.

Does not know which parts a request has. The request that it reads from limits size and time.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

_FILE_TYPE = re.compile(rb"\s*(image/|application/octet-stream\s*(;|$))", re.IGNORECASE)
_EXTENDED_FILENAME = re.compile(rb";\s*filename\*", re.IGNORECASE)


async def read_form(request: Request, *, max_parts: int, max_text_bytes: int) -> FormData:
    """Parse a multipart body into files, and texts of at most `max_text_bytes`. Close the form when its files are read.

    Raises MultiPartException.
    """
    _, options = parse_options_header(request.headers.get("content-type", ""))
    stream = request.stream()
    if b"boundary" in options:  # without one, the parser reports the error
        stream = _from_first_delimiter(stream, options[b"boundary"])
    limits = {"max_files": max_parts, "max_fields": max_parts, "max_part_size": max_text_bytes}
    return await _Parts(request.headers, stream, **limits).parse()


class _Parts(MultiPartParser):
    """Starlette treats a part as a file only if it has a filename, which RFC 7578, 4.2 does not require.

    Starlette documents that: https://github.com/Kludex/starlette/pull/1704. Here a part is also a file if its type is image/* or
    application/octet-stream, or if it has only `filename*`, which some libraries use for names that are not ASCII.
    """

    def on_headers_finished(self) -> None:
        part = self._current_part
        disposition = part.content_disposition or b""
        is_file = _EXTENDED_FILENAME.search(disposition) or any(
            name == b"content-type" and _FILE_TYPE.match(value) for name, value in part.item_headers
        )
        if is_file and b"filename" not in parse_options_header(disposition)[1]:
            part.content_disposition = disposition + b'; filename="unnamed"'
        super().on_headers_finished()


async def _from_first_delimiter(stream: AsyncGenerator[bytes, None], boundary: bytes) -> AsyncGenerator[bytes, None]:
    """Skip the preamble, which "implementations must ignore" (RFC 2046, 5.1.1).

    python-multipart treats it as a malformed delimiter: https://github.com/Kludex/python-multipart/pull/260.
    """
    # Spaces may follow a delimiter. python-multipart rejects them with an error; skipping such a part as a preamble would lose it silently.
    delimiter = re.compile(rb"(?:\A|\r\n)(--" + re.escape(boundary) + rb"(?:--|\r\n|[ \t]))")
    held = b""
    is_begin = True  # whether `held` is the beginning of the body
    async for piece in stream:
        held += piece
        if found := delimiter.search(held) if is_begin else delimiter.search(held, 1):
            yield held[found.start(1) :]
            async for more in stream:
                yield more
            return
        # Keep what may be an incomplete delimiter, and one byte before it, so that it does not count as the beginning of the body.
        kept = len(boundary) + 8
        if len(held) > kept:
            held, is_begin = held[-kept:], False
    if held:
        raise MultiPartException("the boundary that Content-Type names does not occur")
