"""However a path is written, what lies behind sees one: keys, limits, origins, routes and metrics are asked about that."""

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
    warnings.simplefilter("ignore")  # of what BentoML is made of, while it is loaded
    from stable_diffusion.server.front_door import FrontDoor
from stable_diffusion.server.access.keys import read_keys
from stable_diffusion.server.access.policy import Access
from stable_diffusion.server.request_target import OnePath, normal_path
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
    """As uvicorn makes it: the path is decoded, whatever the target is."""
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


def passed_on(scope: Scope, with_slash: tuple[str, ...] = ("/ui/",)) -> Scope:
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
def test_slashes_that_mean_nothing_are_left_out(path: str, meant: str) -> None:
    assert normal_path(path, ("/ui/",)) == meant


@pytest.mark.parametrize("path", ["/", "/ui/", "//a//b/", "/a/../b", "/a/./b/", "/jobs//x"])
def test_a_path_in_its_form_stays_in_it(path: str) -> None:
    once = normal_path(path, ("/ui/",))
    assert normal_path(once, ("/ui/",)) == once


@pytest.mark.parametrize("target", SPELLINGS)
def test_every_spelling_is_the_same_path_inside(target: bytes) -> None:
    inner = passed_on(scope_of(target + b"?a=//b/"))
    assert (inner["path"], inner["raw_path"], inner["query_string"]) == ("/txt2img", b"/txt2img", b"a=//b/")


@pytest.mark.parametrize("target", [b"http://any.example", b"http://any.example/", b"http://any.example//"])
def test_the_absolute_form_without_a_path_is_the_first_page(target: bytes) -> None:
    assert passed_on(scope_of(target))["path"] == "/"


def test_the_host_of_an_absolute_target_counts_and_no_other_is_seen() -> None:
    scope = scope_of(b"http://meant.example:8080/status", headers={"Accept": "*/*"})
    scope["headers"].append((b"host", b"another.example"))
    assert passed_on(scope)["headers"] == [(b"host", b"meant.example:8080"), (b"accept", b"*/*")]


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
def test_what_is_no_absolute_form_of_http_is_no_path_of_ours(target: bytes) -> None:
    inner = passed_on(scope_of(target))
    assert inner["path"] != "/status"
    assert dict(inner["headers"])[b"host"] == b"server"


def test_a_path_that_looks_like_a_host_is_a_path() -> None:
    assert passed_on(scope_of(b"//any.example/status"))["path"] == "/any.example/status"


class Door:
    """The front door behind `OnePath`, before an application that notes what it sees."""

    def __init__(self, access: Access) -> None:
        self.seen: list[str] = []
        routes = [Route("/txt2img", REACHED, methods=["GET", "POST"]), Route("/jobs/{job_id}", REACHED, methods=["GET"])]
        door = FrontDoor(self._app, routes, dict.fromkeys(("/", "/metrics"), REACHED), lambda: access)
        self._door = OnePath(door, ("/ui/",))

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append(scope["path"])
        await REACHED(scope, receive, send)

    def status(self, target: bytes, method: str = "GET", **headers: str) -> int:
        answered: list[int] = []

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered.append(message["status"])

        named = {name.replace("_", "-"): value for name, value in headers.items()}
        asyncio.run(self._door(scope_of(target, method, named), nothing, send))
        return answered[0]


def keyed(**changes: Any) -> Access:
    return Access(read_keys({"SD_API_KEYS": f"alice:{KEY}"}), **changes)


@pytest.mark.parametrize("target", SPELLINGS)
def test_no_spelling_goes_around_the_key_or_the_check_of_origins(target: bytes) -> None:
    door = Door(keyed())
    assert door.status(target, "POST") == 401
    assert door.status(target, "POST", x_api_key=KEY, sec_fetch_site="cross-site", origin="https://other.example") == 403
    assert door.status(target, "DELETE", x_api_key=KEY) == 405
    assert door.seen == []
    assert door.status(target, "POST", x_api_key=KEY) == 200


@pytest.mark.parametrize("target", [b"/livez", b"//livez", b"/livez/", b"http://any.example/livez"])
def test_what_is_open_is_open_in_every_spelling_and_opens_nothing_else(target: bytes) -> None:
    door = Door(keyed())
    assert door.status(target) == 200
    assert door.status(target + b"/../txt2img", "POST") == 401
    assert door.status(target + b"//txt2img", "POST") == 401


def test_all_spellings_count_towards_one_rate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SD_SHARED_FOLDER", str(tmp_path / "shared"))
    name_shared_folder()
    door = Door(keyed(requests_per_minute=2))
    assert [door.status(target, "POST", x_api_key=KEY) for target in SPELLINGS] == [200, 200] + [429] * (len(SPELLINGS) - 2)


def test_metrics_see_the_template_whatever_the_spelling() -> None:
    door = Door(Access())
    for target in (b"/jobs/1", b"//jobs/2", b"/jobs//3/", b"http://any.example/jobs/4", b"/%2Fjobs/5"):
        assert door.status(target) == 200
    assert door.status(b"/jobs/") == 404
    assert door.seen == ["/jobs/{job_id}"] * 5
