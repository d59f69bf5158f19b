"""Both services, started once for all HTTP tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.service.servers import ROOT, Server, serve


@pytest.fixture(scope="session", params=["fp32", "fp16"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A source checkout without weights: the demo model."""
    precision = request.param
    with serve(ROOT / precision, "service:svc", tmp_path_factory.mktemp(precision), {"BENTOML_CONFIG": "configuration.yaml"}) as started:
        yield started
