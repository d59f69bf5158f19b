"""Reads request headers: the caller, the time limit, and how the response should be delivered.

Does not read bodies.
"""

from __future__ import annotations

import hashlib
import re
import time
from dataclasses import dataclass

from starlette.requests import Request

from stable_diffusion.core.errors import DeadlineExceeded, InvalidRequest
from stable_diffusion.core.settings import MAX_TIMEOUT_S
from stable_diffusion.core.types import ImageFormat, RequestContext, Ticket
from stable_diffusion.images.encode import MEDIA_TYPES
from stable_diffusion.web import sse

TIMEOUT_HEADER = "Request-Timeout"  # seconds
_MAX_KEY_CHARACTERS = 255


def context_of(request: Request) -> RequestContext:
    """The context that the front door has stored in the request."""
    found: RequestContext = request.scope[RequestContext.KEY]
    return found


def ticket_of(request: Request) -> Ticket:
    """A ticket for the request: the job id from the front door, the owner, and the remaining time.

    Raises InvalidRequest, or DeadlineExceeded if reading the request has used up the time.
    """
    found = context_of(request)
    left_s = _timeout_s(request) - (time.monotonic() - found.received_s)
    if left_s <= 0:
        raise DeadlineExceeded(f"{TIMEOUT_HEADER}: the time was over before the request was read")
    return Ticket(
        job_id=found.job_id,
        owner=owner_of(request),
        timeout_s=left_s,
        key_name=found.key_name,
        client_address=request.client.host if request.client else None,
    )


def _timeout_s(request: Request) -> float:
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return MAX_TIMEOUT_S
    # No exponents, no signs, no inf or nan.
    timeout_s = float(text) if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text, re.ASCII) else 0.0
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        message = f"{TIMEOUT_HEADER} must be a number of seconds above 0 and at most {MAX_TIMEOUT_S:.0f}, got {text[:60]}"
        raise InvalidRequest(message, field=TIMEOUT_HEADER)
    return timeout_s


def rename_job(request: Request, job_id: str) -> None:
    """Assign the request to an existing job, whose id the response then carries, even if it is an error."""
    context_of(request).job_id = job_id


def key_name_of(request: Request) -> str | None:
    """The name of the request's API key; None if the server has no keys."""
    return context_of(request).key_name


def owner_of(request: Request) -> str:
    """An opaque identifier of the caller.

    It derives from the API key if the server has keys, else from the Authorization header, or without one from the address.
    """
    name = key_name_of(request)
    if name is not None:
        return hashlib.sha256(f"key {name}".encode()).hexdigest()[:32]
    authorization = request.headers.get("authorization", "")
    if not authorization.partition(" ")[2]:  # clients without a password send an empty header, or only a scheme
        authorization = ""
    address = request.client.host if request.client else ""
    return hashlib.sha256(f"{authorization}\n{'' if authorization else address}".encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Delivery:
    """How a client wants the image of a request that generates. `image_format` is None if it accepts none of the types."""

    events: bool  # server-sent events
    image_format: ImageFormat | None
    asynchronous: bool  # respond at once with a job that the client can query
    idempotency_key: str | None  # a repeated request with this key gets the job of the first


def delivery_of(request: Request) -> Delivery:
    """Read Accept, Prefer and Idempotency-Key. Raises InvalidRequest."""
    accepted = accepted_types(request)
    return Delivery(accepted.events, accepted.image_format, _prefers_async(request), _idempotency_key(request))


def _prefers_async(request: Request) -> bool:
    """Whether the client sent `Prefer: respond-async` (RFC 7240, 4.1)."""
    preferences = ",".join(request.headers.getlist("prefer")).lower().split(",")
    return any(preference.partition(";")[0].strip() == "respond-async" for preference in preferences)


def _idempotency_key(request: Request) -> str | None:
    """The header Idempotency-Key, with which a repeated request gets the job of the first. Raises InvalidRequest."""
    key = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= _MAX_KEY_CHARACTERS and key.isascii() and key.isprintable()):
        raise InvalidRequest(f"Idempotency-Key must have 1 to {_MAX_KEY_CHARACTERS} printable ASCII characters", field="Idempotency-Key")
    return key


@dataclass(frozen=True)
class Accepted:
    """The media types that the client accepts: events, if it names them, and its preferred image type, if any."""

    events: bool
    image_format: ImageFormat | None


def accepted_types(request: Request) -> Accepted:
    """Read the Accept header (RFC 9110, 12.5.1): the most specific range that matches a type determines its quality.

    Among types of equal quality the one whose range comes first wins, then JPEG: a client without a preference gets JPEG.
    """
    ranges = _ranges(",".join(request.headers.getlist("accept")) or "*/*")
    acceptable: list[tuple[float, int, ImageFormat]] = []
    for image_format, media_type in MEDIA_TYPES.items():
        matching = next((ranges[one] for one in (media_type, "image/*", "*/*") if one in ranges), None)
        if matching is not None and matching.quality > 0:
            acceptable.append((-matching.quality, matching.place, image_format))
    return Accepted(
        events=sse.MEDIA_TYPE in ranges and ranges[sse.MEDIA_TYPE].quality > 0,
        # min returns the first of equal entries.
        image_format=min(acceptable, key=lambda entry: entry[:2])[2] if acceptable else None,
    )


@dataclass(frozen=True)
class _Range:
    quality: float  # 0: not acceptable
    place: int  # in the header


def _ranges(accept: str) -> dict[str, _Range]:
    """The ranges of an Accept header by name; of repeated ones the highest quality counts. A malformed quality counts as 0."""
    ranges: dict[str, _Range] = {}
    for place, entry in enumerate(accept.split(",")):
        name, *options = (part.strip().lower() for part in entry.split(";"))
        quality = next((option[2:] for option in options if option.startswith("q=")), "1")
        found = _Range(float(quality) if re.fullmatch(r"\d+\.?\d*|\.\d+", quality, re.ASCII) else 0.0, place)
        name = name or "*/*"
        if name not in ranges or found.quality > ranges[name].quality:
            ranges[name] = found
    return ranges
