"""An AWS of our own on loopback: moto's server in a process of its own, as boto3 and Terraform's helpers call it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from tests.deployment.commands import OPERATOR, TOOLS
from tests.http.servers import Server, environment, free_port, stop, wait_until_ready


@dataclass(frozen=True)
class StandInAws:
    url: str

    @property
    def variables(self) -> dict[str, str]:
        """What makes boto3 speak to it."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@pytest.fixture(scope="session")
def aws_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandInAws]:
    port = free_port()
    folder = tmp_path_factory.mktemp("moto")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [str(TOOLS / "moto_server"), "-H", "127.0.0.1", "-p", str(port)],
            cwd=folder,
            env=environment(folder),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        server = Server(f"http://127.0.0.1:{port}", folder / "log", process)
        wait_until_ready(server, "/moto-api/")
        yield StandInAws(server.url)
    finally:
        stop(process)


@pytest.fixture
def aws(aws_server: StandInAws, monkeypatch: pytest.MonkeyPatch) -> StandInAws:
    """The stand-in for AWS, empty, and this process's environment set to use it."""
    httpx.post(f"{aws_server.url}/moto-api/reset", trust_env=False).raise_for_status()
    for name, value in aws_server.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    return aws_server


@pytest.fixture(autouse=True)
def _operator_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bentoctl does it."""
    monkeypatch.syspath_prepend(str(OPERATOR))
