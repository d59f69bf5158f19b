"""The image type that an Accept header selects (RFC 9110, 12.5.1)."""

from __future__ import annotations

import pytest
from starlette.requests import Request

from stable_diffusion.web.headers import accepted_types

FIREFOX = "image/avif,image/webp,image/png,image/svg+xml,image/*;q=0.8,*/*;q=0.5"
CHROMIUM = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8"
JAVA = "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2"


def request(*accept: str) -> Request:
    return Request({"type": "http", "headers": [(b"accept", one.encode()) for one in accept]})


@pytest.mark.parametrize(
    ("accept", "image_format"),
    [
        # The most specific range that matches a type counts.
        ("image/jpeg;q=0, */*", "png"),
        ("*/*, image/jpeg;q=0", "png"),
        ("image/jpeg;q=0, image/*", "png"),
        ("image/jpeg;q=0, image/png;q=0, */*", "webp"),
        ("image/png;q=0, */*", "jpeg"),
        ("image/*;q=0, */*", None),
        ("image/*;q=0, image/webp, */*", "webp"),
        ("*/*;q=0, image/png", "png"),
        ("*/*;q=0", None),
        ("image/jpeg;q=0", None),
        ("image/jpeg;q=0.5, */*;q=0.8", "png"),
        ("image/jpeg;q=0.5, image/*;q=0.1, */*;q=0.8", "jpeg"),
        ("image/jpeg;q=0.000, */*", "png"),
        ("IMAGE/JPEG;Q=0, */*", "png"),
        # The highest quality wins, then the range that comes first, then JPEG.
        ("*/*", "jpeg"),
        ("image/*", "jpeg"),
        ("", "jpeg"),
        ("image/png", "png"),
        ("image/webp, image/png", "webp"),
        ("image/png, */*", "png"),
        ("*/*, image/png", "jpeg"),
        ("image/jpeg;q=0.5, image/webp;q=0.9", "webp"),
        ("image/png;q=0.3, image/*;q=0.3", "png"),
        ("text/html", None),
        # A malformed quality means not acceptable.
        ("image/png;q=much, image/webp;q=0.1", "webp"),
        ("image/png;q=nan, image/webp;q=inf", None),
        ("image/png;q=-1", None),
        # Headers of real clients.
        (FIREFOX, "webp"),
        (CHROMIUM, "webp"),
        (JAVA, "jpeg"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", "jpeg"),
    ],
)
def test_the_type_has_the_highest_quality_by_its_most_specific_range(accept: str, image_format: str | None) -> None:
    assert accepted_types(request(accept)).image_format == image_format


def test_the_default_is_jpeg() -> None:
    assert accepted_types(request()).image_format == "jpeg"


def test_repeated_headers_are_combined() -> None:
    assert accepted_types(request("*/*", "image/jpeg;q=0")).image_format == "png"


@pytest.mark.parametrize(
    ("accept", "events"),
    [
        ("text/event-stream", True),
        ("image/png, text/event-stream;q=0.1", True),
        ("text/event-stream;q=0, */*", False),
        ("text/*", False),
        ("*/*", False),
    ],
)
def test_events_are_sent_only_to_clients_that_name_them(accept: str, events: bool) -> None:
    assert accepted_types(request(accept)).events is events
