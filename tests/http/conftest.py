from __future__ import annotations

import pytest

from tests.http.following import wait_until_idle


@pytest.fixture(autouse=True)
def _nothing_is_left_running(request: pytest.FixtureRequest) -> None:
    """A test begins at a server that is idle: in a batch with what an earlier test has left, an image may differ by a level."""
    if "server" in request.fixturenames:
        wait_until_idle(request.getfixturevalue("server"))
