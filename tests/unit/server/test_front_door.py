"""The front door, in front of an application that only reports that it was reached."""

from __future__ import annotations

import asyncio
import gzip
import os
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # from BentoML's dependencies, while they are imported
    from bentoml._internal.configuration.containers import BentoMLContainer

    from stable_diffusion.server.bentoml_fixes import host as host_of_server
    from stable_diffusion.server.bentoml_fixes import port as port_of_server
    from stable_diffusion.server.front_door import FrontDoor, refuse_while_stopping

from stable_diffusion.server.access.keys import read_keys
from stable_diffusion.server.access.policy import Access
from stable_diffusion.state.folder import name_shared_folder

ROOT = Path(__file__).parents[3]
REACHED = PlainTextResponse("reached")
OPEN_TO_EVERYONE = Access()


@pytest.fixture
def cors() -> Iterator[None]:
    """CORS as BentoML's configuration would set it."""
    BentoMLContainer.http.cors.enabled.set(True)
    with BentoMLContainer.access_control_options.patch({"allow_origins": ["https://friend.example"]}):
        yield
    BentoMLContainer.http.cors.enabled.set(False)


def status_of(method: str, site: str | None, origin: str = "https://friend.example") -> int:
    headers = {} if site is None else {"Sec-Fetch-Site": site, "Origin": origin}
    return response_to(method, headers).status_code


def response_to(
    method: str,
    headers: dict[str, str],
    access: Access = OPEN_TO_EVERYONE,
    path: str = "/txt2img",
    content: bytes | None = None,
    inner: ASGIApp = REACHED,
) -> httpx.Response:
    pages = dict.fromkeys(("/", "/docs.json", "/readyz", "/metrics"), REACHED)
    app = FrontDoor(inner, [Route("/txt2img", REACHED, methods=["GET", "POST"])], pages, lambda: access)

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.request(method, path, headers=headers, content=content)

    return asyncio.run(send())


@pytest.mark.parametrize("site", [None, "none", "same-origin", "same-site"])
def test_same_origin_and_non_browser_requests_pass(site: str | None) -> None:
    assert status_of("POST", site) == 200


def test_pages_of_other_sites_may_only_send_reading_requests() -> None:
    assert [status_of(method, "cross-site") for method in ("GET", "OPTIONS", "POST")] == [200, 200, 403]


@pytest.mark.usefixtures("cors")
def test_requests_from_an_allowed_origin_pass() -> None:
    assert status_of("POST", "cross-site") == 200
    assert status_of("POST", "cross-site", "https://other.example") == 403


KEY = "correct-horse-battery-staple"
PREFLIGHT = {"Origin": "https://friend.example", "Access-Control-Request-Method": "POST"}


def keyed(**changes: Any) -> Access:
    return Access(read_keys({"SD_API_KEYS": f"alice:{KEY}"}), **changes)


def test_a_missing_or_wrong_key_gets_401_with_a_challenge() -> None:
    for headers in ({}, {"Authorization": ""}, {"Authorization": "Bearer " + "x" * 20}, {"X-API-Key": KEY + "x"}):
        response = response_to("POST", headers, keyed())
        assert response.status_code == 401
        assert response.json()["error"]["type"] == "unauthorized"
        assert response.headers["www-authenticate"].startswith('Basic realm="')
        assert KEY not in response.text


def test_a_request_with_the_key_passes() -> None:
    assert response_to("POST", {"X-API-Key": KEY}, keyed()).text == "reached"


def test_an_unknown_path_gets_401_without_a_key_and_404_with_one() -> None:
    assert response_to("GET", {}, keyed(), "/nowhere").status_code == 401
    assert response_to("GET", {"X-API-Key": KEY}, keyed(), "/nowhere").status_code == 404


def test_probes_and_opened_pages_need_no_key() -> None:
    opened = keyed(open=frozenset({"docs", "metrics"}))
    assert {path: response_to("GET", {}, keyed(), path).status_code for path in ("/livez", "/readyz", "/healthz")} == {
        "/livez": 200,
        "/readyz": 200,
        "/healthz": 200,
    }
    for path in ("/", "/docs.json", "/static_content/swagger-ui.css"):
        assert [response_to("GET", {}, access, path).status_code for access in (keyed(), opened)] == [401, 200]


def test_without_cors_a_preflight_needs_a_key() -> None:
    assert response_to("OPTIONS", PREFLIGHT, keyed()).status_code == 401
    assert response_to("OPTIONS", PREFLIGHT, keyed(), "/metrics").status_code == 401


@pytest.mark.usefixtures("cors")
def test_a_preflight_needs_no_key_but_other_options_requests_do() -> None:
    assert response_to("OPTIONS", PREFLIGHT, keyed()).text == "reached"
    assert response_to("OPTIONS", {"Origin": "https://friend.example"}, keyed()).status_code == 401


@pytest.mark.usefixtures("cors")
def test_an_allowed_origin_can_read_a_401() -> None:
    refused = response_to("POST", {"Origin": "https://friend.example"}, keyed())
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://friend.example")
    other = response_to("POST", {"Origin": "https://other.example"}, keyed())
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.usefixtures("cors")
@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("DELETE", "/txt2img", 405), ("GET", "/readyz", 200)])
def test_an_allowed_origin_can_read_the_front_doors_own_responses(method: str, path: str, status: int) -> None:
    response = response_to(method, {"Origin": "https://friend.example"}, path=path)
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (status, "https://friend.example")
    assert "access-control-allow-origin" not in response_to(method, {"Origin": "https://other.example"}, path=path).headers


@pytest.mark.usefixtures("cors")
def test_an_allowed_origin_can_read_that_the_server_shuts_down() -> None:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(refuse_while_stopping), base_url="http://server") as client:
            return await client.get("/status", headers={"Origin": "https://friend.example"})

    response = asyncio.run(send())
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (503, "https://friend.example")


def test_generation_requests_over_the_rate_limit_get_429_and_other_requests_are_not_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SD_SHARED_FOLDER", str(tmp_path / "shared"))
    name_shared_folder()
    limited = keyed(requests_per_minute=2)
    key = {"X-API-Key": KEY}
    assert [response_to("GET", key, limited).status_code for _ in range(4)] == [200] * 4
    responses = [response_to("POST", key, limited) for _ in range(3)]
    assert [response.status_code for response in responses] == [200, 200, 429]
    assert responses[2].json()["error"]["type"] == "rate_limited"
    assert responses[2].headers["retry-after"] == "30"


PRIVATE = {**PREFLIGHT, "Access-Control-Request-Private-Network": "true"}


def behind_bentomls_cors() -> ASGIApp:
    return CORSMiddleware(REACHED, **BentoMLContainer.access_control_options.get(), allow_methods=["GET", "POST"])


@pytest.mark.usefixtures("cors")
def test_a_private_network_preflight_passes_from_an_allowed_origin() -> None:
    response = response_to("OPTIONS", PRIVATE, keyed(), inner=behind_bentomls_cors())
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, "https://friend.example")
    assert response.headers["access-control-allow-private-network"] == "true"


@pytest.mark.usefixtures("cors")
def test_a_private_network_preflight_fails_from_other_origins() -> None:
    for changes in ({"Origin": "https://other.example"}, {"Origin": "null"}, {"Origin": "https://friend.example.other.example"}):
        response = response_to("OPTIONS", {**PRIVATE, **changes}, keyed(), inner=behind_bentomls_cors())
        assert response.status_code == 400
        assert not {"access-control-allow-origin", "access-control-allow-private-network"} & set(response.headers)
    assert "access-control-allow-private-network" not in response_to("OPTIONS", PREFLIGHT, inner=behind_bentomls_cors()).headers
    not_allowed = {**PRIVATE, "Access-Control-Request-Method": "DELETE"}
    assert response_to("OPTIONS", not_allowed, inner=behind_bentomls_cors()).status_code == 400


def test_without_cors_a_private_network_preflight_fails() -> None:
    assert response_to("OPTIONS", PRIVATE, keyed()).status_code == 401
    assert "access-control-allow-private-network" not in response_to("OPTIONS", PRIVATE).headers


async def _echo(scope: Scope, receive: Receive, send: Send) -> None:
    request = Request(scope, receive)
    seen = sorted({"content-encoding", "content-length"} & set(request.headers))
    await PlainTextResponse(f"{(await request.body()).decode()} {seen}")(scope, receive, send)


@pytest.mark.parametrize(
    ("coding", "compress"),
    [
        ("gzip", gzip.compress),
        ("x-gzip", gzip.compress),
        ("GZIP", gzip.compress),
        ("deflate", zlib.compress),
        ("identity, gzip", gzip.compress),
    ],
)
def test_the_application_sees_a_decompressed_body(coding: str, compress: Callable[[bytes], bytes]) -> None:
    response = response_to("POST", {"Content-Encoding": coding}, content=compress(b"hello"), inner=_echo)
    assert response.text == "hello []"


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip", "gzip, br", "gzip;q=1", "x" * 500])
def test_an_unsupported_content_coding_gets_415_that_lists_the_supported_ones(coding: str) -> None:
    response = response_to("POST", {"Content-Encoding": coding}, content=b"x", inner=_echo)
    assert (response.status_code, response.headers["accept-encoding"]) == (415, "gzip, deflate")
    assert response.json()["error"]["type"] == "unsupported_media_type"
    assert response.json()["error"]["message"] == f"Content-Encoding must be one of gzip, deflate, or be left out, got {coding[:60]}"


def test_an_unsupported_content_coding_needs_the_key_and_does_not_count_towards_the_rate_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SD_SHARED_FOLDER", str(tmp_path / "shared"))
    name_shared_folder()
    limited, headers = keyed(requests_per_minute=1), {"X-API-Key": KEY, "Content-Encoding": "br"}
    assert response_to("POST", {"Content-Encoding": "br"}, limited).status_code == 401
    assert [response_to("POST", headers, limited).status_code for _ in range(3)] == [415] * 3
    assert response_to("POST", {"X-API-Key": KEY}, limited).status_code == 200


def test_a_request_with_two_lengths_gets_400_and_its_connection_is_closed() -> None:
    response = response_to("POST", {"Content-Length": "5", "Transfer-Encoding": "chunked"}, keyed())
    assert (response.status_code, response.headers["connection"]) == (400, "close")
    assert response.json()["error"]["message"] == "a request must not have both Content-Length and Transfer-Encoding"


def test_the_host_comes_from_the_command_line_or_bentomls_configuration() -> None:
    assert host_of_server() == "0.0.0.0"
    command = click.Command("serve")
    for given, host in (
        ({"host": "127.0.0.1"}, "127.0.0.1"),
        ({"host": None, "development": True}, "127.0.0.1"),
        ({"host": None}, "0.0.0.0"),
    ):
        context = click.Context(command)
        context.params.update(given)
        with context:
            assert host_of_server() == host


def test_the_port_comes_from_the_command_line_or_bentomls_configuration() -> None:
    assert port_of_server() == 3000
    context = click.Context(click.Command("serve"))
    context.params["port"] = 3001
    with context:
        assert port_of_server() == 3001


_TIMERS = """
import sys
from bentoml._internal.context import server_context
server_context.service_type = sys.argv[1]
from fp32.service import stable_diffusion_runner, svc
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.server.runner_app import RunnerAppFactory
from bentoml._internal.server.http_app import HTTPAppFactory
app = RunnerAppFactory(stable_diffusion_runner) if sys.argv[1] == "runner" else HTTPAppFactory(svc)
names = [one.cls.__name__ for one in app.middlewares]
assert names
print("TimeoutMiddleware" in names, BentoMLContainer.runners_config.get()["traffic"]["timeout"])
"""


@pytest.mark.parametrize(("process", "waits_s"), [("runner", 0), ("api_server", 3600)])
def test_no_process_has_request_timers_and_api_workers_keep_their_runner_timeout(process: str, waits_s: int) -> None:
    variables = {**os.environ, "BENTOML_CONFIG": str(ROOT / "fp32" / "configuration.yaml")}
    command = [sys.executable, "-W", "ignore", "-c", _TIMERS, process]
    finished = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True)
    assert finished.stdout.split() == ["False", str(waits_s)]
