"""What a client asks for in headers: image types, events, an asynchronous response, idempotency."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from stable_diffusion.core.errors import InvalidRequest
from stable_diffusion.core.types import ImageFormat
from stable_diffusion.images.encode import MEDIA_TYPES
from stable_diffusion.web import sse

_MAX_KEY_CHARACTERS = 255


def prefers_no_waiting(request: Request) -> bool:
    """Whether the client sent `Prefer: respond-async` (RFC 7240, 4.1)."""
    preferences = ",".join(request.headers.getlist("prefer")).lower().split(",")
    return any(preference.partition(";")[0].strip() == "respond-async" for preference in preferences)


def idempotency_key(request: Request) -> str | None:
    """The header Idempotency-Key, with which a repeated request gets the job of the first. Raises InvalidRequest."""
    key = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= _MAX_KEY_CHARACTERS and key.isascii() and key.isprintable()):
        raise InvalidRequest(f"Idempotency-Key: must have 1 to {_MAX_KEY_CHARACTERS} printable ASCII characters", field="Idempotency-Key")
    return key


@dataclass(frozen=True)
class Accepted:
    """What the client accepts: events, if it names them, and its preferred image type, if any."""

    events: bool
    image_format: ImageFormat | None


def accepted_types(request: Request) -> Accepted:
    """Read the Accept header (RFC 9110, 12.5.1). A client without a preference gets jpeg."""
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
        events=any(media_type == sse.MEDIA_TYPE for _, media_type in liked),
        # max returns the first of equal entries.
        image_format=formats[max(images_liked, key=lambda entry: entry[0])[1]] if images_liked else None,
    )
