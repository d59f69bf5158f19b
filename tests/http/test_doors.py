"""Every door of both services draws the same picture from the same words and seed."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

import openai
import pytest
from PIL import Image

from tests.http.asking import PROMPT, draw, picture_of
from tests.http.following import ask, ended, start
from tests.http.servers import Server

SEED, STEPS = 11, 6


def through_openai(server: Server) -> bytes:
    transport = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", http_client=transport) as client:
        answer = client.images.generate(prompt=PROMPT, extra_body={"seed": SEED, "num_inference_steps": STEPS})
    assert answer.data is not None
    return base64.b64decode(answer.data[0].b64_json or "")


def through_a1111(server: Server) -> bytes:
    body = {"prompt": PROMPT, "seed": SEED, "steps": STEPS, "cfg_scale": 7.5}
    with server.client() as client:
        return base64.b64decode(client.post("/sdapi/v1/txt2img", json=body).json()["images"][0])


def through_a_job(server: Server) -> bytes:
    job = ended(server, start(server, seed=SEED, num_inference_steps=STEPS).headers["location"])
    return ask(server, job["picture"], accept="image/png").content


def through_its_own_file(server: Server) -> bytes:
    drawn = draw(server, seed=SEED, num_inference_steps=STEPS)
    with server.client() as client:
        return client.post("/reproduce", files={"picture": drawn.content}, headers={"Accept": "image/png"}).content


@pytest.mark.parametrize("through", [through_openai, through_a1111, through_a_job, through_its_own_file])
def test_every_door_draws_the_same_picture(server: Server, through: Callable[[Server], bytes]) -> None:
    plain = picture_of(draw(server, seed=SEED, num_inference_steps=STEPS))
    assert Image.open(io.BytesIO(through(server))).convert("RGB").tobytes() == plain.tobytes()
