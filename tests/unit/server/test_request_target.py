"""Keys, rate limits, origins, routes and metrics see one path, however the request target is written."""

from __future__ import annotations

import asyncio
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # from BentoML's dependencies, while they are imported
    from stable_diffusion.server.front_door import FrontDoor
from stable_diffusion.server.access.keys import read_keys
from stable_diffusion.server.access.policy import Access
from stable_diffusion.server.middleware import OnePath, normal_path
from stable_diffusion.state.folder import name_shared_folder

KEY = "correct-horse-battery-staple"
REACHED = PlainTextResponse("reached")
SPELLINGS = (
    b"//txt2img",
    b"/txt2img/",
    b"///txt2img///",
    b"/%2Ftxt2img",
    b"/txt2img%2F",
    b"http://any.example/txt2img",
    b"http://any.example//txt2img/",
    b"HTTPS://any.example:443/txt2img",
    b"http://[::1]:3000/txt2img",
)


def scope_of(target: bytes, method: str = "GET", headers: dict[str, str] | None = None) -> Scope:
    """The scope as uvicorn makes it: the path is decoded, whatever form the target has."""
    raw_path, _, query = target.partition(b"?")
    encoded = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    return {
        "type": "http",
        "method": method,
        "path": unquote(raw_path.decode()),
        "raw_path": raw_path,
        "query_string": query,
        "headers": [(b"host", b"server"), *encoded],
        "client": ("127.0.0.1", 1),
    }


def scope_behind(scope: Scope, with_slash: tuple[str, ...] = ("/ui/",)) -> Scope:
    seen: list[Scope] = []

    async def app(inner: Scope, receive: Receive, send: Send) -> None:
        seen.append(inner)

    asyncio.run(OnePath(app, with_slash)(scope, nothing, discard))
    return seen[0]


async def nothing() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def discard(message: Message) -> None:
    return None


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/", "/"),
        ("//", "/"),
        ("/v1/models", "/v1/models"),
        ("//v1/models", "/v1/models"),
        ("/v1//models", "/v1/models"),
        ("/v1/models/", "/v1/models"),
        ("///v1///models///", "/v1/models"),
        ("/ui/", "/ui/"),
        ("//ui//", "/ui/"),
        ("/ui", "/ui"),
        ("/ui/main.js/", "/ui/main.js"),
        ("*", "*"),
        ("example.com:443", "example.com:443"),
        ("", ""),
    ],
)
def test_redundant_slashes_are_removed(path: str, meant: str) -> None:
    assert normal_path(path, ("/ui/",)) == meant


@pytest.mark.parametrize("path", ["/", "/ui/", "//a//b/", "/a/../b", "/a/./b/", "/jobs//x"])
def test_normalising_twice_changes_nothing(path: str) -> None:
    once = normal_path(path, ("/ui/",))
    assert normal_path(once, ("/ui/",)) == once


@pytest.mark.parametrize("target", SPELLINGS)
def test_the_application_sees_one_path_for_every_spelling(target: bytes) -> None:
    inner = scope_behind(scope_of(target + b"?a=//b/"))
    assert (inner["path"], inner["raw_path"], inner["query_string"]) == ("/txt2img", b"/txt2img", b"a=//b/")


@pytest.mark.parametrize("target", [b"http://any.example", b"http://any.example/", b"http://any.example//"])
def test_an_absolute_target_without_a_path_is_the_root(target: bytes) -> None:
    assert scope_behind(scope_of(target))["path"] == "/"


def test_the_host_of_an_absolute_target_replaces_the_host_header() -> None:
    scope = scope_of(b"http://meant.example:8080/status", headers={"Accept": "*/*"})
    scope["headers"].append((b"host", b"another.example"))
    assert scope_behind(scope)["headers"] == [(b"host", b"meant.example:8080"), (b"accept", b"*/*")]


@pytest.mark.parametrize(
    "target",
    [
        b"http%3A//any.example/status",
        b"http://alice:secret@any.example/status",
        b"http:///status",
        b"http://any.example#/status",
        b"http://any.example\\/status",
        b"ftp://any.example/status",
        b"gopher://any.example/status",
        b"any.example/status",
    ],
)
def test_malformed_absolute_targets_match_no_route(target: bytes) -> None:
    inner = scope_behind(scope_of(target))
    assert inner["path"] != "/status"
    assert dict(inner["headers"])[b"host"] == b"server"


def test_a_path_with_a_leading_double_slash_is_not_taken_for_a_host() -> None:
    assert scope_behind(scope_of(b"//any.example/status"))["path"] == "/any.example/status"


class Server:
    """`OnePath`, the front door, and an application that notes the paths it sees."""

    def __init__(self, access: Access) -> None:
        self.seen: list[str] = []
        routes = [Route("/txt2img", REACHED, methods=["GET", "POST"]), Route("/jobs/{job_id}", REACHED, methods=["GET"])]
        front_door = FrontDoor(self._app, routes, dict.fromkeys(("/", "/metrics"), REACHED), lambda: access)
        self._outer = OnePath(front_door, ("/ui/",))

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append(scope["path"])
        await REACHED(scope, receive, send)

    def status(self, target: bytes, method: str = "GET", **headers: str) -> int:
        statuses: list[int] = []

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        named = {name.replace("_", "-"): value for name, value in headers.items()}
        asyncio.run(self._outer(scope_of(target, method, named), nothing, send))
        return statuses[0]


def keyed(**changes: Any) -> Access:
    return Access(read_keys({"SD_API_KEYS": f"alice:{KEY}"}), **changes)


@pytest.mark.parametrize("target", SPELLINGS)
def test_no_spelling_bypasses_keys_origins_or_methods(target: bytes) -> None:
    server = Server(keyed())
    assert server.status(target, "POST") == 401
    assert server.status(target, "POST", x_api_key=KEY, sec_fetch_site="cross-site", origin="https://other.example") == 403
    assert server.status(target, "DELETE", x_api_key=KEY) == 405
    assert server.seen == []
    assert server.status(target, "POST", x_api_key=KEY) == 200


@pytest.mark.parametrize("target", [b"/livez", b"//livez", b"/livez/", b"http://any.example/livez"])
def test_a_probe_is_open_in_every_spelling_and_opens_nothing_else(target: bytes) -> None:
    server = Server(keyed())
    assert server.status(target) == 200
    assert server.status(target + b"/../txt2img", "POST") == 401
    assert server.status(target + b"//txt2img", "POST") == 401


def test_all_spellings_count_towards_one_rate_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SD_SHARED_FOLDER", str(tmp_path / "shared"))
    name_shared_folder()
    server = Server(keyed(requests_per_minute=2))
    assert [server.status(target, "POST", x_api_key=KEY) for target in SPELLINGS] == [200, 200] + [429] * (len(SPELLINGS) - 2)


def test_metrics_see_the_route_template_for_every_spelling() -> None:
    server = Server(Access())
    for target in (b"/jobs/1", b"//jobs/2", b"/jobs//3/", b"http://any.example/jobs/4", b"/%2Fjobs/5"):
        assert server.status(target) == 200
    assert server.status(b"/jobs/") == 404
    assert server.seen == ["/jobs/{job_id}"] * 5
