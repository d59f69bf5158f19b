"""Fixtures of the tests in a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser

from tests.browser.chromium import CHROMIUM, chromium
from tests.browser.visit import Visit
from tests.http.servers import Server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with chromium() as started:
        yield started


@pytest.fixture
def visiting(browser: Browser, server: Server) -> Iterator[Callable[..., Visit]]:
    """Opens the page. Afterwards the page must have sent no request to other hosts, and the console must have no errors."""
    visits: list[Visit] = []

    def open_page(script: str = "", **options: Any) -> Visit:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        context.set_default_timeout(20_000)
        if script:
            context.add_init_script(script)
        visit = Visit(server, context, context.new_page())
        visits.append(visit)
        visit.begin()
        return visit

    yield open_page
    for visit in visits:
        visit.context.close()
    for visit in visits:
        assert [url for url in visit.asked if not url.startswith((f"{server.url}/", "blob:", "data:"))] == []
        assert visit.complaints == []


@pytest.fixture
def visit(visiting: Callable[..., Visit]) -> Visit:
    return visiting()
