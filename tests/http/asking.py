"""Requests to our own endpoints as tests send them, and what came back."""

from __future__ import annotations

import io
import json

import httpx
from PIL import Image

from tests.http.servers import Server

PROMPT = "a red circle on a blue background"


def as_file(picture: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def draw(server: Server, accept: str = "image/png", **fields: object) -> httpx.Response:
    with server.client() as client:
        return client.post("/txt2img", json={"prompt": PROMPT, "num_inference_steps": 10, **fields}, headers={"Accept": accept})


def redraw(server: Server, path: str, files: dict[str, bytes], accept: str = "image/png", **fields: object) -> httpx.Response:
    data = {"prompt": PROMPT, "num_inference_steps": 10, **fields}
    with server.client() as client:
        return client.post(path, files=files, data={"data": json.dumps(data)}, headers={"Accept": accept})


def picture_of(response: httpx.Response) -> Image.Image:
    assert response.status_code == 200, response.text
    return Image.open(io.BytesIO(response.content)).convert("RGB")


def refused(response: httpx.Response, status: int, field: str | None = None) -> str:
    """The message of an error, whose form is checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"type", "message", "problems"}
    if field is not None:
        assert field in [problem["field"] for problem in body["error"]["problems"]]
    assert "Traceback" not in response.text
    assert "/stable_diffusion" not in response.text
    message: str = body["error"]["message"]
    return message
