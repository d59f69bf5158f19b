"""The operator's policy and what the safety checker says reach the client, through every door, for each picture."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.http.servers import ROOT, environment, free_port, serve
from tests.safety_checkers import make_checked_model

REQUEST = {"prompt": "a red circle", "num_inference_steps": 4, "output_format": "png"}


def is_blank(content: bytes) -> bool:
    return Image.open(io.BytesIO(content)).convert("L").getextrema() == (0, 0)


def flagged_pictures(client: httpx.Client) -> float:
    counts = re.findall(r'stable_diffusion_images_total\{.*outcome="flagged".*\} (\S+)', client.get("/metrics").text)
    return sum(float(count) for count in counts)


def test_a_flagged_picture_is_blank_and_each_door_says_so_of_each_picture(tmp_path: Path) -> None:
    folder = make_checked_model(tmp_path / "strict", flags_everything=True)
    with serve(ROOT / "fp32", "service:svc", tmp_path / "home", {"SD_MODEL": str(folder)}) as server, server.client() as client:
        flagged = client.post("/txt2img", json=REQUEST)
        unchecked = client.post("/txt2img", json=REQUEST | {"safety_check": False})
        again = client.post("/txt2img", json=REQUEST)
        counted = flagged_pictures(client)
        both = client.post("/v1/images/generations", json=REQUEST | {"n": 2}).json()["data"]
        a1111 = client.post("/sdapi/v1/txt2img", json={"prompt": "a red circle", "steps": 4, "batch_size": 2}).json()
        redrawn = client.post("/reproduce", files={"picture": unchecked.content})
        counted_after = flagged_pictures(client)
        capabilities = client.get("/capabilities").json()
    assert [answer.headers["safety_flagged"] for answer in (flagged, unchecked, again)] == ["true", "unchecked", "true"]
    assert [answer.headers["safety_check"] for answer in (flagged, unchecked, again)] == ["true", "false", "true"]
    assert [is_blank(answer.content) for answer in (flagged, unchecked, again)] == [True, False, True]
    assert flagged.headers["model"] == "strict"
    # OpenAI's and A1111's APIs: the blank pictures keep their places.
    assert [one["safety_flagged"] for one in both] == [True, True]
    assert is_blank(base64.b64decode(both[0]["b64_json"]))
    assert json.loads(a1111["info"])["all_flagged"] == [True, True]
    assert [is_blank(base64.b64decode(image)) for image in a1111["images"]] == [True, True]
    # What was drawn unchecked is drawn again as the policy says.
    assert (redrawn.headers["safety_check"], redrawn.headers["safety_flagged"]) == ("true", "true")
    assert (counted, counted_after) == (2, 7)
    assert capabilities["safety"] == {"policy": "default-on", "has_checker": True}


def test_where_every_picture_is_checked_no_door_draws_one_unchecked(tmp_path: Path) -> None:
    folder = make_checked_model(tmp_path / "strict", flags_everything=True)
    variables = {"SD_MODEL": str(folder), "SD_SAFETY": "always"}
    with serve(ROOT / "fp32", "service:svc", tmp_path / "home", variables) as server, server.client() as client:
        unchecked = REQUEST | {"safety_check": False}
        picture = io.BytesIO()
        Image.new("RGB", (64, 64), "green").save(picture, "PNG")
        refused = {
            "plain": client.post("/txt2img", json=unchecked),
            "form": client.post("/img2img", files={"img": picture.getvalue()}, data={"data": json.dumps(unchecked)}),
            "openai": client.post("/v1/images/generations", json=unchecked),
            "openai form": client.post(
                "/v1/images/edits", files={"image": picture.getvalue()}, data={"prompt": "a red circle", "safety_check": "false"}
            ),
        }
        drawn = client.post("/txt2img", json=REQUEST)
    assert {name: answer.status_code for name, answer in refused.items()} == dict.fromkeys(refused, 400)
    told = "safety_check: must be true or omitted, this server checks every image"
    assert {name: answer.json()["error"]["message"] for name, answer in refused.items()} == dict.fromkeys(refused, told)
    assert refused["plain"].json()["error"]["problems"][0]["field"] == "safety_check"
    assert refused["openai"].json()["error"]["param"] == "safety_check"
    assert drawn.headers["safety_flagged"] == "true"


@pytest.mark.parametrize(
    ("said", "told"), [("always", "Not started: SD_SAFETY=always, but the model demo"), ("on", "Not started: SD_SAFETY is 'on', allowed")]
)
def test_a_server_with_a_policy_that_it_cannot_keep_does_not_start(said: str, told: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bentoml", "serve", "service:svc", "--production", "--host", "127.0.0.1", "--port", str(free_port())]
    changes = {"SD_SAFETY": said, "BENTOML_CONFIG": "configuration.yaml"}
    ended = subprocess.run(
        command, cwd=ROOT / "fp32", env=environment(tmp_path, changes), capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode != 0
    assert told in ended.stderr + ended.stdout
    assert "Traceback" not in ended.stderr + ended.stdout
