"""The worst files at every endpoint that accepts images: refused in the API's error form, and the server keeps working."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable

import httpx
import pytest

from tests.hostile_pictures import RGB, chunk, corpus, flat_png, header_only_png
from tests.http.asking import PROMPT
from tests.http.servers import Server

MAX_TAKEN_S = 20
NAMES = {
    "png of 65535 x 65535 in its header": 413,
    "png, tRNS, a wrong checksum": 400,
    "png, a million empty chunks": 413,
    "jpeg, a million empty segments": 413,
    "jpeg of 4096 pixels, 100,000 scans": 413,
    "jpeg, EXIF of 15 MiB": 413,
    "webp of 16383 x 16383 in its header": 413,
    "webp with a frame larger than itself": 400,
    "a GIF file": 400,
    "an SVG file": 400,
    "a PostScript program": 400,
    "nothing": 400,
}


BOMB_OF_TEXT = "png, zTXt of 200 MiB before the pixels"


@pytest.fixture(scope="module")
def corpus_files() -> dict[str, bytes]:
    return {case.name: case.content for case in corpus() if case.name in (*NAMES, BOMB_OF_TEXT)}


@pytest.fixture(scope="module")
def files(corpus_files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in corpus_files.items() if name != BOMB_OF_TEXT}


def through_img2img(client: httpx.Client, content: bytes) -> tuple[int, str]:
    response = client.post("/img2img", files={"img": content}, data={"data": json.dumps({"prompt": PROMPT, "num_inference_steps": 2})})
    problem = response.json()["error"]["problems"][0]
    return response.status_code, f"{problem['field']} {problem['message']}"


def through_inpaint(client: httpx.Client, content: bytes) -> tuple[int, str]:
    right = flat_png(64, 64, 8, RGB)
    response = client.post("/inpaint", files={"img": right, "mask": content}, data={"data": json.dumps({"prompt": PROMPT})})
    problem = response.json()["error"]["problems"][0]
    return response.status_code, f"{problem['field']} {problem['message']}"


def through_reproduce(client: httpx.Client, content: bytes) -> tuple[int, str]:
    response = client.post("/reproduce", files={"picture": content})
    problem = response.json()["error"]["problems"][0]
    return response.status_code, f"{problem['field']} {problem['message']}"


def through_openai(client: httpx.Client, content: bytes) -> tuple[int, str]:
    response = client.post("/v1/images/edits", files={"image": content}, data={"prompt": PROMPT})
    error = response.json()["error"]
    return response.status_code, f"{error['param']} {error['message']}"


def through_a1111(client: httpx.Client, content: bytes) -> tuple[int, str]:
    body = {"prompt": PROMPT, "init_images": [base64.b64encode(content).decode()]}
    response = client.post("/sdapi/v1/img2img", json=body)
    return response.status_code, response.json()["detail"]


DOORS: dict[Callable[[httpx.Client, bytes], tuple[int, str]], str] = {
    through_img2img: "img img: ",
    through_inpaint: "mask mask: ",
    through_reproduce: "picture picture: ",
    through_openai: "image image: ",
    through_a1111: "init_images: ",
}


@pytest.mark.parametrize("through", DOORS)
def test_the_worst_files_are_refused_with_the_reason(
    server: Server, files: dict[str, bytes], through: Callable[[httpx.Client, bytes], tuple[int, str]]
) -> None:
    assert files.keys() == NAMES.keys()
    with server.client() as client:
        client.timeout = httpx.Timeout(MAX_TAKEN_S)
        for name, content in files.items():
            status, told = through(client, content)
            # A form reader treats an empty text as a missing image, and A1111's API responds with 400 to data that is not an image.
            assert status in (NAMES[name], 400 if through is through_a1111 else NAMES[name]), (name, status, told)
            assert told.startswith(DOORS[through]), (name, told)


def test_a_text_bomb_is_refused_only_by_endpoints_that_read_the_text(server: Server, corpus_files: dict[str, bytes]) -> None:
    bomb = corpus_files[BOMB_OF_TEXT]
    with server.client() as client:
        client.timeout = httpx.Timeout(MAX_TAKEN_S)
        assert through_reproduce(client, bomb) == (
            400,
            "picture picture: its text parameters is too long, at most 1048576 bytes are allowed",
        )
        response = client.post("/img2img", files={"img": bomb}, data={"data": json.dumps({"prompt": PROMPT, "num_inference_steps": 2})})
        assert response.status_code == 200, response.text


def test_the_server_still_generates_afterwards(server: Server) -> None:
    picture = file_with_everything_odd()
    with server.client() as client:
        response = client.post("/img2img", files={"img": picture}, data={"data": json.dumps({"prompt": PROMPT, "num_inference_steps": 2})})
        assert response.status_code == 200, response.text
        assert client.get("/readyz").status_code == 200
    assert "Traceback" not in server.log
    assert "PIL" not in server.log


def file_with_everything_odd() -> bytes:
    """Unusual files that must be decoded: 16 bits, a missing animation, invalid EXIF, another file appended."""
    odd = chunk(b"acTL", bytes(8)) + chunk(b"eXIf", b"MM\0*" + b"\xff" * 400) + chunk(b"aaAa", b"%!PS")
    return flat_png(64, 64, 16, RGB, before=odd) + header_only_png(60_000, 60_000)
