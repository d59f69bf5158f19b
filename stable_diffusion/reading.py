"""What a client sent and what it takes: bodies within their limits, forms, the Accept header, whether it is still there.

Knows nothing of what is drawn, nor which door the request came through.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.types import Message

from stable_diffusion import events, images
from stable_diffusion.decoding import Decoding
from stable_diffusion.errors import ClientGone, DeadlineExceeded, InvalidRequest, RequestTimeout, TooLarge, UnsupportedMediaType
from stable_diffusion.images import MEDIA_TYPES, ImageFormat
from stable_diffusion.jobs import Ticket
from stable_diffusion.limits import MAX_TIMEOUT_S
from stable_diffusion.requests import (
    MAX_NAMES,
    ImageToImageRequest,
    ReproductionRequest,
    parse_image_to_image,
    parse_json,
    parse_reproduction,
)
from stable_diffusion.uploads import Uploads

MAX_JSON_BYTES = 2**20
TIMEOUT_HEADER = "Request-Timeout"  # seconds
# A body that is still coming after UPLOAD_GRACE_S and a second for each UPLOAD_BYTES_PER_S of it is too slow.
UPLOAD_PAUSE_S = 15.0
UPLOAD_GRACE_S = 20.0
UPLOAD_BYTES_PER_S = 16 * 2**10
UPLOAD_TIMEOUT_S = 300.0
_MAX_KEY_CHARACTERS = 255

T = TypeVar("T")


async def read_json_body(request: Request, *, max_bytes: int = MAX_JSON_BYTES, max_names: int = MAX_NAMES) -> dict[str, Any]:
    """Raises InvalidRequest, TooLarge or UnsupportedMediaType."""
    return await run_in_threadpool(parse_json, await json_content(request, max_bytes), "body", max_names)


async def json_content(request: Request, max_bytes: int) -> bytes:
    """A JSON body as it was sent. Raises TooLarge or UnsupportedMediaType."""
    require_content_type(request, "application/json")
    return await limited(request, max_bytes).body()


async def read_form(request: Request, *files: str) -> tuple[ImageToImageRequest, dict[str, bytes]]:
    """The `data` part, validated, and the bytes of the named file parts."""
    contents, data = await _read_parts(request, files, ())
    if data is None:
        raise InvalidRequest('data: the part is missing, send JSON (curl: -F data=\'{"prompt":"a red circle"}\')', field="data")
    return parse_image_to_image(parse_json(data, "data")), contents


async def read_reproduction_form(request: Request) -> tuple[ReproductionRequest, dict[str, bytes]]:
    """The `data` part, validated; it may be left out. The bytes of the part `picture`, and of `img` and `mask` where they are there."""
    contents, data = await _read_parts(request, ("picture",), ("img", "mask"))
    return parse_reproduction({} if data is None else parse_json(data, "data")), contents


async def _read_parts(request: Request, required: Sequence[str], optional: Sequence[str]) -> tuple[dict[str, bytes], bytes | str | None]:
    """The files by their names, and what the part `data` holds."""
    files = (*required, *optional)
    async with opened_form(request, max_pictures=max(2, len(files)), max_parts=8) as form:
        _refuse_unknown_parts(form, (*files, "data"))
        contents = {name: await file_part(form, name) for name in files if name in required or name in form}
        return contents, await _data_part(form)


@asynccontextmanager
async def opened_form(request: Request, *, max_pictures: int, max_parts: int) -> AsyncIterator[FormData]:
    """The parts of a multipart body, whose files can be read until the block ends. `max_pictures` of the largest size fit into it."""
    require_content_type(request, "multipart/form-data")
    whole = limited(request, max_pictures * images.MAX_UPLOAD_BYTES + 2 * MAX_JSON_BYTES)
    try:
        async with whole.form(max_files=max_parts, max_fields=max_parts, max_part_size=MAX_JSON_BYTES) as form:
            yield form
    except (MultiPartException, HTTPException) as error:
        reason = error.message if isinstance(error, MultiPartException) else error.detail
        raise InvalidRequest(f"body: not a readable multipart form: {reason}", field="body") from None


def require_content_type(request: Request, expected: str) -> None:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != expected:
        given = f"not {content_type[:60]}" if content_type else "it is missing"
        raise UnsupportedMediaType(f"Content-Type must be {expected}, {given}", field="Content-Type")


@contextmanager
def counted(request: Request, uploads: Uploads) -> Iterator[Request]:
    """The same request, whose body counts among `uploads` until the block ends, which is to be when it is decoded.

    Reading it raises QueueFull where there is no room.
    """
    declared = request.headers.get("content-length", "")
    with uploads.of(owner_of(request), int(declared) if declared.isdigit() else 0) as count:

        async def receive() -> Message:
            message = await request.receive()
            count(len(message.get("body", b"")))
            return message

        yield Request(request.scope, receive)


def limited(request: Request, max_bytes: int) -> Request:
    """The same request, whose body may have at most `max_bytes`, whether it says how long it is or not, and must not be slow."""
    received, began_s = 0, time.monotonic()

    async def receive() -> Message:
        nonlocal received
        message = await _received_in_time(request, received, began_s)
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise TooLarge(f"the body has more than {max_bytes} bytes", field="body")
        return message

    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise TooLarge(f"the body has {int(declared)} bytes, at most {max_bytes} are allowed", field="body")
    return Request(request.scope, receive)


async def _received_in_time(request: Request, received: int, began_s: float) -> Message:
    """The next piece of a body of which `received` bytes are there. Raises RequestTimeout."""
    passed_s = time.monotonic() - began_s
    left_s = min(UPLOAD_TIMEOUT_S, UPLOAD_GRACE_S + received / UPLOAD_BYTES_PER_S) - passed_s
    with anyio.move_on_after(min(UPLOAD_PAUSE_S, left_s)):
        return await request.receive()
    raise RequestTimeout(
        f"the body came too slowly, {received} bytes in {time.monotonic() - began_s:.0f} s: allowed are {UPLOAD_GRACE_S:g} s and one "
        f"more for every {UPLOAD_BYTES_PER_S} bytes, at most {UPLOAD_TIMEOUT_S:g} s, and pauses of {UPLOAD_PAUSE_S:g} s",
        field="body",
    )


def _refuse_unknown_parts(form: FormData, known: tuple[str, ...]) -> None:
    for name in form:
        if name not in known:
            raise InvalidRequest(f"{name[:60]}: not a known part, allowed are {', '.join(known)}", field=name[:60])
        if len(form.getlist(name)) > 1:
            raise InvalidRequest(f"{name}: the part is given more than once", field=name)


async def file_part(form: FormData, name: str) -> bytes:
    part = form.get(name)
    if part is None:
        raise InvalidRequest(f"{name}: the part is missing, send an image file (curl: -F {name}=@input.jpg)", field=name)
    if not isinstance(part, UploadFile):
        raise InvalidRequest(f"{name}: must be a file, not text (curl: -F {name}=@input.jpg)", field=name)
    return await part.read()


async def _data_part(form: FormData) -> bytes | str | None:
    part = form.get("data")
    if isinstance(part, UploadFile):
        if part.size is not None and part.size > MAX_JSON_BYTES:
            raise TooLarge(f"data: at most {MAX_JSON_BYTES} bytes are allowed", field="data")
        return await part.read()
    return part


def ticket_of(request: Request) -> Ticket:
    """The job that the front door made of this request, for whom it is, and how long it may still take.

    Raises InvalidRequest, or DeadlineExceeded if reading the request has taken all of that.
    """
    job = request.scope["job"]
    left_s = _timeout_s(request) - (time.monotonic() - job.received_s)
    if left_s <= 0:
        raise DeadlineExceeded("the time that the request allows was over before it was read")
    return Ticket(job_id=job.id, owner=owner_of(request), timeout_s=left_s)


def _timeout_s(request: Request) -> float:
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return MAX_TIMEOUT_S
    # No exponents, no signs, no names of numbers.
    timeout_s = float(text) if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text, re.ASCII) else 0.0
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        message = f"{TIMEOUT_HEADER}: must be a number of seconds above 0, at most {MAX_TIMEOUT_S:.0f}"
        raise InvalidRequest(message, field=TIMEOUT_HEADER)
    return timeout_s


def rename_job(request: Request, job_id: str) -> None:
    """The request turned out to be for this job: its answer, an error too, names that one."""
    request.scope["job"].id = job_id


def key_name_of(request: Request) -> str | None:
    """Whose API key the front door found; None where the server has no keys."""
    name: str | None = request.scope.get("key_name")
    return name


def owner_of(request: Request) -> str:
    """Who asks, as far as that can be told. Not readable for anybody.

    Where the server has API keys by the key, else by the Authorization that was sent, or without one by the address.
    """
    name = key_name_of(request)
    if name is not None:
        return hashlib.sha256(f"key {name}".encode()).hexdigest()[:32]
    authorization = request.headers.get("authorization", "")
    if not authorization.partition(" ")[2]:  # clients without a password send an empty one, or a scheme with nothing behind it
        authorization = ""
    address = request.client.host if request.client else ""
    return hashlib.sha256(f"{authorization}\n{'' if authorization else address}".encode()).hexdigest()[:32]


def prefers_no_waiting(request: Request) -> bool:
    """RFC 7240, 4.1."""
    preferences = ",".join(request.headers.getlist("prefer")).lower().split(",")
    return any(preference.partition(";")[0].strip() == "respond-async" for preference in preferences)


def idempotency_key(request: Request) -> str | None:
    """The header of that name, which makes a second request the same as the first. Raises InvalidRequest."""
    key = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= _MAX_KEY_CHARACTERS and key.isascii() and key.isprintable()):
        raise InvalidRequest(f"Idempotency-Key: must have 1 to {_MAX_KEY_CHARACTERS} printable ASCII characters", field="Idempotency-Key")
    return key


@dataclass(frozen=True)
class Accepted:
    """What the client takes: events, if it names them, and the image type that it likes best, if there is one."""

    events: bool
    image_format: ImageFormat | None


def accepted_types(request: Request) -> Accepted:
    """RFC 9110, 12.5.1. A client that does not mind gets jpeg."""
    accept = ",".join(request.headers.getlist("accept")) or "*/*"
    formats: dict[str, ImageFormat] = {name: image_format for image_format, name in MEDIA_TYPES.items()}
    formats |= {"*/*": "jpeg", "image/*": "jpeg", "": "jpeg"}
    liked: list[tuple[float, str]] = []
    for entry in accept.split(","):
        media_type, *options = (part.strip().lower() for part in entry.split(";"))
        quality = next((option[2:] for option in options if option.startswith("q=")), "1")
        try:
            weight = float(quality)
        except ValueError:
            weight = 0.0
        if weight > 0:
            liked.append((weight, media_type))
    images_liked = [entry for entry in liked if entry[1] in formats]
    return Accepted(
        events=any(media_type == events.MEDIA_TYPE for _, media_type in liked),
        # max gives the first one among equals.
        image_format=formats[max(images_liked, key=lambda entry: entry[0])[1]] if images_liked else None,
    )


async def decoded(request: Request, decoding: Decoding, work: Callable[[], T]) -> T:
    """What `work` makes of what was uploaded, when it is this caller's turn. Raises QueueFull, and ClientGone once nobody waits for it."""
    return await while_connected(request, decoding.run(owner_of(request), work))


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` until it is done or the client has gone: then cancel it and raise ClientGone."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone("the client closed the connection")
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue
