"""Reads request bodies, JSON and multipart forms, within limits on size, time and the number of values.

Does not know which fields a request has.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.types import Message

from stable_diffusion.core.errors import InvalidRequest, RequestTimeout, TooLarge, UnsupportedMediaType
from stable_diffusion.images.decode import MAX_UPLOAD_BYTES
from stable_diffusion.web.headers import owner_of
from stable_diffusion.web.multipart import read_form
from stable_diffusion.web.upload_budget import Uploads

MAX_JSON_BYTES = 2**20
MAX_NAMES = 64  # names in a JSON object; a request has about a dozen
MAX_VALUES = 2**14  # values in a JSON body, at all depths: parsing millions of them would block all other requests

# A body may take UPLOAD_GRACE_S plus a second for each UPLOAD_BYTES_PER_S received. A slower one is refused.
UPLOAD_PAUSE_S = 15.0
UPLOAD_GRACE_S = 20.0
UPLOAD_BYTES_PER_S = 16 * 2**10
UPLOAD_TIMEOUT_S = 300.0


async def read_json_body(request: Request, *, max_bytes: int = MAX_JSON_BYTES, max_names: int = MAX_NAMES) -> dict[str, Any]:
    """Read and parse a JSON body. Raises InvalidRequest, TooLarge or UnsupportedMediaType."""
    return await run_in_threadpool(parse_json, await json_content(request, max_bytes), "body", max_names)


async def json_content(request: Request, max_bytes: int) -> bytes:
    """Read a JSON body without parsing it. Raises TooLarge or UnsupportedMediaType."""
    require_content_type(request, "application/json")
    return await limited(request, max_bytes).body()


async def read_parts(request: Request, required: Sequence[str], optional: Sequence[str]) -> tuple[dict[str, bytes], bytes | str | None]:
    """The file parts by name, and the content of the `data` part, None if it is missing."""
    files = (*required, *optional)
    async with opened_form(request, max_images=max(2, len(files)), max_parts=8) as form:
        _refuse_unknown_or_repeated_parts(form, (*files, "data"))
        contents = {name: await file_part(form, name) for name in files if name in required or name in form}
        return contents, await _data_part(form)


@asynccontextmanager
async def opened_form(request: Request, *, max_images: int, max_parts: int) -> AsyncIterator[FormData]:
    """Yield the parts of a multipart body. Its files can be read until the block ends. `max_images` uploads of maximum size fit."""
    require_content_type(request, "multipart/form-data")
    whole = limited(request, max_images * MAX_UPLOAD_BYTES + 2 * MAX_JSON_BYTES)
    try:
        form = await read_form(whole, max_parts=max_parts, max_text_bytes=MAX_JSON_BYTES)
        try:
            yield form
        finally:
            await form.close()
    except MultiPartException as error:
        raise InvalidRequest(f"body: not a valid multipart form: {error.message}", field="body") from None


def require_content_type(request: Request, expected: str) -> None:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != expected:
        given = f"got {content_type[:60]}" if content_type else "but it is missing"
        raise UnsupportedMediaType(f"Content-Type must be {expected}, {given}", field="Content-Type")


@contextmanager
def within_upload_budget(request: Request, uploads: Uploads) -> Iterator[Request]:
    """Yield the same request, with its body counted in `uploads` until the block ends. End the block when the body is decoded.

    Reading the body raises QueueFull if the budget is exhausted.
    """
    declared = request.headers.get("content-length", "")
    with uploads.of(owner_of(request), int(declared) if declared.isdigit() else 0) as count:

        async def receive() -> Message:
            message = await request.receive()
            count(len(message.get("body", b"")))
            return message

        yield Request(request.scope, receive)


def limited(request: Request, max_bytes: int) -> Request:
    """The same request, with its body limited to `max_bytes`, whatever length it declares, and by the time limits above."""
    received_bytes, began_s = 0, time.monotonic()

    async def receive() -> Message:
        nonlocal received_bytes
        message = await _receive_in_time(request, received_bytes, began_s)
        received_bytes += len(message.get("body", b""))
        if received_bytes > max_bytes:
            raise TooLarge(f"the body must have at most {max_bytes} bytes, got more", field="body")
        return message

    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise TooLarge(f"the body must have at most {max_bytes} bytes, got {int(declared)}", field="body")
    return Request(request.scope, receive)


async def _receive_in_time(request: Request, received_bytes: int, began_s: float) -> Message:
    """The next message of a body of which `received_bytes` have arrived. Raises RequestTimeout."""
    passed_s = time.monotonic() - began_s
    left_s = min(UPLOAD_TIMEOUT_S, UPLOAD_GRACE_S + received_bytes / UPLOAD_BYTES_PER_S) - passed_s
    with anyio.move_on_after(min(UPLOAD_PAUSE_S, left_s)):
        return await request.receive()
    raise RequestTimeout(
        f"the body arrived too slowly, {received_bytes} bytes in {time.monotonic() - began_s:.0f} s: it may take {UPLOAD_GRACE_S:g} s plus "
        f"1 s per {UPLOAD_BYTES_PER_S} bytes, at most {UPLOAD_TIMEOUT_S:g} s, without a pause longer than {UPLOAD_PAUSE_S:g} s",
        field="body",
    )


def _refuse_unknown_or_repeated_parts(form: FormData, known: tuple[str, ...]) -> None:
    for name in form:
        if name not in known:
            raise InvalidRequest(f"{name[:60]}: unknown part, allowed are {', '.join(known)}", field=name[:60])
        if len(form.getlist(name)) > 1:
            raise InvalidRequest(f"{name}: the part is given more than once", field=name)


async def file_part(form: FormData, name: str) -> bytes:
    part = form.get(name)
    if part is None:
        raise InvalidRequest(f"{name}: the part is missing, send an image file (curl: -F {name}=@input.jpg)", field=name)
    if not isinstance(part, UploadFile):
        message = f"{name}: must be a file, got text: give the part a filename or a type such as image/png (curl: -F {name}=@input.jpg)"
        raise InvalidRequest(message, field=name)
    return await part.read()


async def _data_part(form: FormData) -> bytes | str | None:
    part = form.get("data")
    if isinstance(part, UploadFile):
        if part.size is not None and part.size > MAX_JSON_BYTES:
            raise TooLarge(f"data: must have at most {MAX_JSON_BYTES} bytes, got {part.size}", field="data")
        return await part.read()
    return part


@dataclass(frozen=True)
class _Constant:
    """Stands for NaN or Infinity until the field is known: json.loads does not pass the name on."""

    name: str  # NaN, Infinity or -Infinity


def parse_json(body: bytes | str, where: str, max_names: int = MAX_NAMES) -> dict[str, Any]:
    """Parse a JSON object strictly: no NaN, no Infinity, no duplicate names. `where` names the body or part in errors without a field.

    No object may have more than `max_names` names, and the document no more than MAX_VALUES values.
    """

    def checked_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) > max_names:
            raise InvalidRequest(f"{where}: a JSON object must have at most {max_names} names, got {len(pairs)}", field=where)
        document: dict[str, Any] = {}
        for name, value in pairs:
            if name in document:
                raise InvalidRequest(f"{name[:60]} is given more than once", field=name[:60])
            _refuse_constant(value, name[:60])
            document[name] = value
        return document

    try:
        # A byte order mark is ignored, as RFC 8259, 8.1 allows: editors and PowerShell write one.
        text = (body.decode("utf-8") if isinstance(body, bytes) else body).removeprefix("\ufeff")
        _limit_values(text, where)
        document = json.loads(text, parse_constant=_Constant, object_pairs_hook=checked_object)
    except UnicodeDecodeError:
        raise InvalidRequest(f"{where}: not UTF-8", field=where) from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"{where}: not valid JSON, {error.msg.lower()} at line {error.lineno} column {error.colno}", field=where
        ) from None
    except (RecursionError, ValueError):  # nested too deeply, or an integer with more digits than Python parses
        raise InvalidRequest(f"{where}: the JSON is nested too deeply or has a number with too many digits", field=where) from None
    _refuse_constant(document, where)
    if not isinstance(document, dict):
        raise InvalidRequest(f'{where}: must be a JSON object, such as {{"prompt": "a red circle"}}', field=where)
    return document


def _refuse_constant(value: Any, name: str) -> None:
    """Refuse constants in `value` and in nested lists. Nested objects were checked when they were parsed."""
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, _Constant):
            raise InvalidRequest(f"{name}: {part.name} is not a number in JSON", field=name)
        if isinstance(part, list):
            pending.extend(reversed(part))


def _limit_values(text: str, where: str) -> None:
    """Estimate the number of values: each but the first follows one of these characters. Those in strings count too; base64 has none."""
    count = sum(text.count(mark) for mark in ",[{")
    if count > MAX_VALUES:
        raise InvalidRequest(f"{where}: must have at most {MAX_VALUES} values, got about {count}", field=where)
