"""Both services, each started once for all HTTP tests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.service.servers import ROOT, Server, serve


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """The server of a precision, started when it is first asked for: a source checkout without weights, so the demo model."""
    with ExitStack() as started:

        @functools.cache
        def start(precision: str) -> Server:
            home = tmp_path_factory.mktemp(precision)
            return started.enter_context(serve(ROOT / precision, "service:svc", home, {"BENTOML_CONFIG": "configuration.yaml"}))

        yield start


@pytest.fixture(scope="session", params=["fp32", "fp16"])
def server(request: pytest.FixtureRequest, start_server: Callable[[str], Server]) -> Server:
    return start_server(request.param)


@pytest.fixture(scope="session")
def fp32_server(start_server: Callable[[str], Server]) -> Server:
    """For what does not depend on the precision."""
    return start_server("fp32")
