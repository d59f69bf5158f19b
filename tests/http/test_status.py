"""`/status` and `/capabilities` say what is true of the started server, in the form that the OpenAPI document promises."""

from __future__ import annotations

import platform
import re
import time
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

import jsonschema  # type: ignore[import-untyped]

from stable_diffusion.core.schedulers import SCHEDULERS
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from tests.http.servers import ROOT, Server


def get(server: Server, path: str) -> Any:
    """Its answer, held against the document."""
    with server.client() as client:
        response = client.get(path)
        document = client.get("/docs.json").json()
    assert response.status_code == 200, response.text
    answer = response.json()
    schema = document["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    jsonschema.validate(answer, {**schema, "components": document["components"]})
    return answer


def test_the_status_of_a_started_server(server: Server) -> None:
    status = get(server, "/status")
    assert (status["ready"], status["stage"]) == (True, "ready")
    assert status["model"] == {"name": "demo", "hash": check_model(DEMO_FOLDER).hash, "is_demo": True}
    [runner] = status["runners"]
    assert runner["stage"] == "ready"
    assert datetime.fromisoformat(runner["since"]) < datetime.now(timezone.utc)
    assert runner["uptime_s"] > 0
    with server.client() as client:
        assert client.get("/docs.json").json()["info"]["title"] == f"stable_diffusion_{runner['precision']}"
    assert runner["dtype"] == "float32"
    assert runner["prediction_type"] == "epsilon"
    assert (runner["caps"][0]["width"], runner["caps"][0]["height"]) == (64, 64)
    assert runner["caps"][0]["pictures"] >= 1
    assert runner["caps"][0]["reason"]
    # The tests have no GPU.
    assert runner["execution"]["way"] == "eager"
    assert runner["execution"]["reason"]
    assert runner["versions"]["python"] == platform.python_version()
    for name in ("torch", "diffusers", "transformers", "bentoml"):
        assert runner["versions"][name] == metadata.version(name)
    assert str(ROOT) not in str(status), "a path leaks"


def test_the_log_says_once_that_the_server_is_ready(server: Server) -> None:
    batch_limit = get(server, "/status")["runners"][0]["caps"][0]["pictures"]
    deadline = time.monotonic() + 20
    while "Ready: " not in server.log:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    lines = re.findall("Ready: .*", server.log)
    assert lines == [f"Ready: {server.url}, model demo, batch limit {batch_limit} at 64x64."]


def test_the_capabilities_are_the_limits_that_requests_meet(server: Server) -> None:
    can = get(server, "/capabilities")
    assert can["kinds"] == ["txt2img", "img2img", "inpaint"]
    assert can["native_size"] == {"width": 64, "height": 64}
    assert [one["scheduler"] for one in can["schedulers"]] == list(SCHEDULERS)
    assert can["default_scheduler"] in SCHEDULERS
    assert [lora["name"] for lora in can["loras"]] == ["hollow", "lcm", "pink"]
    assert can["embeddings"] == ["sun"]
    assert can["fields"]["num_inference_steps"] == {"default": 50, "maximum": 150, "minimum": 1}
    assert can["fields"]["height"] == {"default": None, "minimum": 64, "maximum": 1024, "multipleOf": 8}
    weight = {"default": 1.0, "minimum": -10, "maximum": 10}
    name = {"minLength": 1, "maxLength": 200}
    assert can["fields"]["loras"] == {"default": [], "maxItems": 8, "items": {"properties": {"name": name, "weight": weight}}}
    with server.client() as client:
        for loras, wrong in (([{"name": "x"}] * 9, "at most 8"), ([{"name": "x", "weight": 10.1}], "less than or equal to 10")):
            refused = client.post("/txt2img", json={"prompt": "a red circle", "loras": loras})
            assert (refused.status_code, refused.json()["error"]["problems"][0]["field"]) == (400, "loras")
            assert wrong in refused.json()["error"]["message"]
        for field, over in (("height", 8), ("num_inference_steps", 1), ("guidance_scale", 1), ("seed", 1)):
            limits = can["fields"][field]
            most = limits["maximum"] if "maximum" in limits else limits["exclusiveMaximum"] - 1
            refused = client.post("/txt2img", json={"prompt": "a red circle", field: most + over})
            assert (refused.status_code, refused.json()["error"]["problems"][0]["field"]) == (400, field)
        most = can["fields"]["prompt"]["maxLength"]
        longest = ("circle " * most)[:most]  # of common words, so that it is within the limit of tokens
        assert client.post("/txt2img", json={"prompt": longest, "num_inference_steps": 2}).status_code == 200
        assert client.post("/txt2img", json={"prompt": longest + "a"}).status_code == 400


def test_only_get_is_allowed(server: Server) -> None:
    with server.client() as client:
        for path in ("/status", "/capabilities"):
            assert client.post(path).status_code == 405
            assert client.head(path).status_code == 200
