"""Stable Diffusion XL over HTTP, with the demo XL model: every API, all kinds, previews, and the image again from its file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from PIL import Image

from stable_diffusion.demo.shapes import judge
from tests.http.asking import as_file, draw, picture_of, redraw, refused
from tests.http.servers import ROOT, Server, serve

PROMPT = "a large red square on a white background"
FIELDS: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 20, "seed": 3}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    changed = {"BENTOML_CONFIG": "configuration.yaml", "SD_MODEL": "demo-xl"}
    with serve(ROOT / "fp32", "service:svc", tmp_path_factory.mktemp("home"), changed) as server:
        yield server


def assert_as_asked(image: Image.Image) -> None:
    verdict = judge(image)
    assert (verdict.colour, verdict.background) == ("red", "white")


def test_the_model_says_what_it_can(server: Server) -> None:
    with server.client() as client:
        can = client.get("/capabilities").json()
    assert (can["model"], can["native_size"]) == ("demo-xl", {"width": 64, "height": 64})
    assert can["fields"]["guidance_scale"]["default"] == 5.0
    assert can["fields"]["width"]["maximum"] == 1024
    assert can["default_scheduler"] == "EulerDiscreteScheduler"


def test_every_api_generates_what_the_prompt_says(server: Server) -> None:
    native = picture_of(draw(server, **FIELDS))
    assert_as_asked(native)
    with server.client() as client:
        body = {"prompt": PROMPT, "steps": 20, "seed": 3, "cfg_scale": 5, "override_settings": {"CLIP_stop_at_last_layers": 2}}
        answer = client.post("/sdapi/v1/txt2img", json=body).json()
    a1111 = Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))
    assert a1111.convert("RGB").tobytes() == native.convert("RGB").tobytes(), "A1111's CLIP skip 2 is the layer that XL is made for"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as official:
        extra = {"seed": 3, "num_inference_steps": 20}
        images = official.images.generate(prompt=PROMPT, extra_body=extra).data
    assert images is not None
    assert Image.open(io.BytesIO(base64.b64decode(images[0].b64_json or ""))).convert("RGB").tobytes() == native.convert("RGB").tobytes()


def test_img2img_and_inpaint_keep_what_they_should(server: Server) -> None:
    blue = Image.new("RGB", (64, 64), (40, 80, 220))
    changed = picture_of(redraw(server, "/img2img", {"img": as_file(blue)}, **FIELDS, strength=0.95))
    assert judge(changed).colour == "red"
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    inpainted = picture_of(redraw(server, "/inpaint", {"img": as_file(blue), "mask": as_file(mask)}, **FIELDS, strength=1.0))
    assert inpainted.convert("RGB").crop((40, 0, 64, 64)).tobytes() == blue.crop((40, 0, 64, 64)).tobytes()


def test_an_image_is_generated_again_from_its_file(server: Server) -> None:
    first = draw(server, **FIELDS, negative_prompt="green")
    with server.client() as client:
        again = client.post("/reproduce", files={"picture": first.content}, headers={"Accept": "image/png"})
    assert picture_of(again).tobytes() == picture_of(first).tobytes()


def test_clip_skip_goes_as_far_as_the_smaller_text_encoder(server: Server) -> None:
    assert "clip_skip: must be at most 1 with the model demo-xl" in refused(draw(server, **FIELDS, clip_skip=2), 400, "clip_skip")
