"""The front door, in front of an app that only says that it was reached."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterator

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.routing import Route

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what BentoML is made of, while it is loaded
    from bentoml._internal.configuration.containers import BentoMLContainer

    from stable_diffusion.api import _FrontDoor

REACHED = PlainTextResponse("reached")


@pytest.fixture
def cors() -> Iterator[None]:
    """As BentoML has it once its configuration is read."""
    BentoMLContainer.http.cors.enabled.set(True)
    with BentoMLContainer.access_control_options.patch({"allow_origins": ["https://friend.example"]}):
        yield
    BentoMLContainer.http.cors.enabled.set(False)


def status_of(method: str, site: str | None, origin: str = "https://friend.example") -> int:
    app = _FrontDoor(REACHED, [Route("/txt2img", REACHED, methods=["GET", "POST"])], {})
    headers = {} if site is None else {"Sec-Fetch-Site": site, "Origin": origin}

    async def ask() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return (await client.request(method, "/txt2img", headers=headers)).status_code

    return asyncio.run(ask())


@pytest.mark.parametrize("site", [None, "none", "same-origin", "same-site"])
def test_what_is_no_browser_and_pages_of_the_server_are_let_in(site: str | None) -> None:
    assert status_of("POST", site) == 200


def test_pages_of_other_sites_may_only_read() -> None:
    assert [status_of(method, "cross-site") for method in ("GET", "OPTIONS", "POST")] == [200, 200, 403]


@pytest.mark.usefixtures("cors")
def test_pages_of_a_site_that_cors_allows_are_let_in() -> None:
    assert status_of("POST", "cross-site") == 200
    assert status_of("POST", "cross-site", "https://other.example") == 403
