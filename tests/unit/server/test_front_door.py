"""The front door, in front of an app that only says that it was reached."""

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
    warnings.simplefilter("ignore")  # of what BentoML is made of, while it is loaded
    from bentoml._internal.configuration.containers import BentoMLContainer

    from stable_diffusion.server.bentoml_fixes import host as host_of_server
    from stable_diffusion.server.front_door import FrontDoor, refuse_while_stopping

from stable_diffusion.server.access.keys import read_keys
from stable_diffusion.server.access.policy import Access
from stable_diffusion.state.folder import name_shared_folder

ROOT = Path(__file__).parents[3]
REACHED = PlainTextResponse("reached")
EVERYBODY = Access()


@pytest.fixture
def cors() -> Iterator[None]:
    """As BentoML has it once its configuration is read."""
    BentoMLContainer.http.cors.enabled.set(True)
    with BentoMLContainer.access_control_options.patch({"allow_origins": ["https://friend.example"]}):
        yield
    BentoMLContainer.http.cors.enabled.set(False)


def status_of(method: str, site: str | None, origin: str = "https://friend.example") -> int:
    headers = {} if site is None else {"Sec-Fetch-Site": site, "Origin": origin}
    return answer_to(method, headers).status_code


def answer_to(
    method: str,
    headers: dict[str, str],
    access: Access = EVERYBODY,
    path: str = "/txt2img",
    content: bytes | None = None,
    inner: ASGIApp = REACHED,
) -> httpx.Response:
    pages = dict.fromkeys(("/", "/docs.json", "/readyz", "/metrics"), REACHED)
    app = FrontDoor(inner, [Route("/txt2img", REACHED, methods=["GET", "POST"])], pages, lambda: access)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.request(method, path, headers=headers, content=content)

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


KEY = "correct-horse-battery-staple"
PREFLIGHT = {"Origin": "https://friend.example", "Access-Control-Request-Method": "POST"}


def keyed(**changes: Any) -> Access:
    return Access(read_keys({"SD_API_KEYS": f"alice:{KEY}"}), **changes)


def test_who_carries_no_key_or_a_wrong_one_gets_a_challenge_and_goes_no_further() -> None:
    for headers in ({}, {"Authorization": ""}, {"Authorization": "Bearer " + "x" * 20}, {"X-API-Key": KEY + "x"}):
        answer = answer_to("POST", headers, keyed())
        assert answer.status_code == 401
        assert answer.json()["error"]["type"] == "unauthorized"
        assert answer.headers["www-authenticate"].startswith('Basic realm="')
        assert KEY not in answer.text


def test_who_carries_the_key_gets_in() -> None:
    assert answer_to("POST", {"X-API-Key": KEY}, keyed()).text == "reached"


def test_a_path_that_does_not_exist_is_not_told_without_a_key() -> None:
    assert answer_to("GET", {}, keyed(), "/nowhere").status_code == 401
    assert answer_to("GET", {"X-API-Key": KEY}, keyed(), "/nowhere").status_code == 404


def test_probes_need_no_key_and_what_the_operator_opens_needs_none() -> None:
    opened = keyed(open=frozenset({"docs", "metrics"}))
    assert {path: answer_to("GET", {}, keyed(), path).status_code for path in ("/livez", "/readyz", "/healthz")} == {
        "/livez": 200,
        "/readyz": 200,
        "/healthz": 200,
    }
    for path in ("/", "/docs.json", "/static_content/swagger-ui.css"):
        assert [answer_to("GET", {}, access, path).status_code for access in (keyed(), opened)] == [401, 200]


def test_without_cors_there_is_no_preflight_to_answer() -> None:
    assert answer_to("OPTIONS", PREFLIGHT, keyed()).status_code == 401
    assert answer_to("OPTIONS", PREFLIGHT, keyed(), "/metrics").status_code == 401


@pytest.mark.usefixtures("cors")
def test_a_preflight_needs_no_key_and_another_options_request_does() -> None:
    assert answer_to("OPTIONS", PREFLIGHT, keyed()).text == "reached"
    assert answer_to("OPTIONS", {"Origin": "https://friend.example"}, keyed()).status_code == 401


@pytest.mark.usefixtures("cors")
def test_a_page_of_a_site_that_cors_allows_can_read_why_it_was_refused() -> None:
    refused = answer_to("POST", {"Origin": "https://friend.example"}, keyed())
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://friend.example")
    other = answer_to("POST", {"Origin": "https://other.example"}, keyed())
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.usefixtures("cors")
@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("DELETE", "/txt2img", 405), ("GET", "/readyz", 200)])
def test_a_page_of_a_site_that_cors_allows_can_read_what_the_front_door_answers(method: str, path: str, status: int) -> None:
    answer = answer_to(method, {"Origin": "https://friend.example"}, path=path)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, "https://friend.example")
    assert "access-control-allow-origin" not in answer_to(method, {"Origin": "https://other.example"}, path=path).headers


@pytest.mark.usefixtures("cors")
def test_a_page_of_a_site_that_cors_allows_can_read_that_the_server_stops() -> None:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(refuse_while_stopping), base_url="http://server") as client:
            return await client.get("/status", headers={"Origin": "https://friend.example"})

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (503, "https://friend.example")


def test_more_drawing_requests_than_allowed_are_refused_with_the_time_to_wait_and_questions_are_not_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SD_SHARED_FOLDER", str(tmp_path / "shared"))
    name_shared_folder()
    limited = keyed(requests_per_minute=2)
    key = {"X-API-Key": KEY}
    assert [answer_to("GET", key, limited).status_code for _ in range(4)] == [200] * 4
    answers = [answer_to("POST", key, limited) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[2].json()["error"]["type"] == "rate_limited"
    assert answers[2].headers["retry-after"] == "30"


PRIVATE = {**PREFLIGHT, "Access-Control-Request-Private-Network": "true"}


def behind_bentomls_cors() -> ASGIApp:
    return CORSMiddleware(REACHED, **BentoMLContainer.access_control_options.get(), allow_methods=["GET", "POST"])


@pytest.mark.usefixtures("cors")
def test_a_preflight_for_a_private_network_passes_where_cors_allows_the_origin() -> None:
    answer = answer_to("OPTIONS", PRIVATE, keyed(), inner=behind_bentomls_cors())
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://friend.example")
    assert answer.headers["access-control-allow-private-network"] == "true"


@pytest.mark.usefixtures("cors")
def test_a_preflight_for_a_private_network_passes_nowhere_else() -> None:
    for changes in ({"Origin": "https://other.example"}, {"Origin": "null"}, {"Origin": "https://friend.example.other.example"}):
        answer = answer_to("OPTIONS", {**PRIVATE, **changes}, keyed(), inner=behind_bentomls_cors())
        assert answer.status_code == 400
        assert not {"access-control-allow-origin", "access-control-allow-private-network"} & set(answer.headers)
    assert "access-control-allow-private-network" not in answer_to("OPTIONS", PREFLIGHT, inner=behind_bentomls_cors()).headers
    not_allowed = {**PRIVATE, "Access-Control-Request-Method": "DELETE"}
    assert answer_to("OPTIONS", not_allowed, inner=behind_bentomls_cors()).status_code == 400


def test_without_cors_a_preflight_for_a_private_network_is_not_answered() -> None:
    assert answer_to("OPTIONS", PRIVATE, keyed()).status_code == 401
    assert "access-control-allow-private-network" not in answer_to("OPTIONS", PRIVATE).headers


async def _say_what_came(scope: Scope, receive: Receive, send: Send) -> None:
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
def test_a_compressed_body_is_decompressed_for_what_lies_behind(coding: str, compress: Callable[[bytes], bytes]) -> None:
    answer = answer_to("POST", {"Content-Encoding": coding}, content=compress(b"hello"), inner=_say_what_came)
    assert answer.text == "hello []"


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip", "gzip, br", "gzip;q=1", "x" * 500])
def test_a_body_in_another_coding_is_refused_by_name_and_is_told_which_are_read(coding: str) -> None:
    answer = answer_to("POST", {"Content-Encoding": coding}, content=b"x", inner=_say_what_came)
    assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "gzip, deflate")
    assert answer.json()["error"]["type"] == "unsupported_media_type"
    assert answer.json()["error"]["message"] == f"Content-Encoding must be one of gzip, deflate, or be left out, not {coding[:60]}"


def test_a_refused_coding_costs_no_request_of_the_rate_and_needs_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SD_SHARED_FOLDER", str(tmp_path / "shared"))
    name_shared_folder()
    limited, headers = keyed(requests_per_minute=1), {"X-API-Key": KEY, "Content-Encoding": "br"}
    assert answer_to("POST", {"Content-Encoding": "br"}, limited).status_code == 401
    assert [answer_to("POST", headers, limited).status_code for _ in range(3)] == [415] * 3
    assert answer_to("POST", {"X-API-Key": KEY}, limited).status_code == 200


def test_a_request_of_two_lengths_is_refused_and_its_connection_ends() -> None:
    answer = answer_to("POST", {"Content-Length": "5", "Transfer-Encoding": "chunked"}, keyed())
    assert (answer.status_code, answer.headers["connection"]) == (400, "close")
    assert answer.json()["error"]["message"] == "a request has Content-Length or Transfer-Encoding, not both"


def test_the_host_is_the_one_of_the_command_line_or_of_bentomls_configuration() -> None:
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
def test_no_process_keeps_a_timer_for_each_request_and_api_workers_wait_for_the_model_process(process: str, waits_s: int) -> None:
    variables = {**os.environ, "BENTOML_CONFIG": str(ROOT / "fp32" / "configuration.yaml")}
    command = [sys.executable, "-W", "ignore", "-c", _TIMERS, process]
    finished = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True)
    assert finished.stdout.split() == ["False", str(waits_s)]
