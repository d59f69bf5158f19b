"""The lines of a real server's log, one for each request that makes or changes something at any door, and what must not be in it."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.http.asking import as_file
from tests.http.log_lines import line_about, line_of
from tests.http.servers import Server

SECRET_PROMPT = "a red circle for Zebulon only"
SECRET_KEY = "key-6f1ed002ab5595859014ebf0951522d9"
HEADERS = {"Authorization": f"Bearer {SECRET_KEY}", "X-API-Key": SECRET_KEY}
DRAWN = {"kind": "txt2img", "width": 64, "height": 64, "steps": 2, "seed": 5, "images": 1, "outcome": "completed", "status": 200}


def body(**fields: object) -> dict[str, object]:
    return {"prompt": SECRET_PROMPT, "seed": 5, "num_inference_steps": 2, **fields}


@pytest.fixture
def client(server: Server) -> Any:
    with server.client() as client:
        client.headers.update(HEADERS)
        yield client


def test_each_door_has_its_line(server: Server, client: httpx.Client, input_picture: Image.Image) -> None:
    picture = as_file(input_picture)
    openai = {"prompt": SECRET_PROMPT, "n": 2, "seed": 5, "num_inference_steps": 2, "size": "64x64"}
    a1111 = {"prompt": SECRET_PROMPT, "steps": 2, "seed": 5, "init_images": [base64.b64encode(picture).decode()]}
    answers = [
        (client.post("/txt2img?secret=query", json=body()), DRAWN | {"path": "/txt2img"}),
        (client.post("/img2img", files={"img": picture}, data={"data": json.dumps(body())}), DRAWN | {"kind": "img2img"}),
        (client.post("/v1/images/generations", json=openai), DRAWN | {"path": "/v1/images/generations", "images": 2}),
        (client.post("/sdapi/v1/img2img", json=a1111), DRAWN | {"kind": "img2img", "path": "/sdapi/v1/img2img"}),
        (client.post("/sdapi/v1/interrupt"), {"path": "/sdapi/v1/interrupt", "status": 200, "outcome": "completed"}),
        (client.post("/txt2img", json=body(width=63)), {"status": 400, "outcome": "refused"}),
        (client.post("/v1/images/generations", json={}), {"status": 400, "outcome": "refused"}),
    ]
    for answer, expected in answers:
        line = line_of(server, answer)
        assert {name: line.get(name) for name in expected} == expected, answer.text[:300]
        assert line["client"] == "127.0.0.1"
        assert line["method"] == "POST"
        if line["outcome"] == "completed" and "kind" in line:
            assert 0 <= line["wait_s"] <= line["time_s"]


def test_events_and_those_who_leave_them_have_their_line(server: Server, client: httpx.Client) -> None:
    accept = {"Accept": "text/event-stream"}
    assert line_of(server, client.post("/txt2img", json=body(), headers=accept)).items() >= DRAWN.items()
    with client.stream("POST", "/txt2img", json=body(num_inference_steps=150, width=256, height=256), headers=accept) as left:
        next(left.iter_lines())
    assert line_of(server, left)["outcome"] == "cancelled"


@pytest.mark.parametrize("accept", ["text/event-stream", "image/png"])
def test_with_an_idempotency_key_a_line_says_how_the_job_ended(server: Server, client: httpx.Client, accept: str) -> None:
    headers = {"Accept": accept, "Idempotency-Key": f"line {accept}"}
    answer = client.post("/txt2img", json=body(), headers=headers)
    assert answer.status_code == 200, answer.text
    assert line_of(server, answer).items() >= DRAWN.items()
    headers["Idempotency-Key"] += " cancelled"
    long = body(num_inference_steps=150)
    with client.stream("POST", "/txt2img", json=long, headers={**headers, "Accept": "text/event-stream"}) as followed:
        client.delete(f"/jobs/{followed.headers['job-id']}")
        assert "event: error" in followed.read().decode()
    line = line_of(server, followed)
    assert (line["status"], line["outcome"]) == (200, "cancelled")


def test_a_job_that_nobody_waits_for_has_a_line_when_it_is_accepted_and_one_when_it_ends(server: Server, client: httpx.Client) -> None:
    accepted = client.post("/txt2img", json=body(), headers={"Prefer": "respond-async"})
    cancelled = client.post("/txt2img", json=body(num_inference_steps=150, width=256, height=256), headers={"Prefer": "respond-async"})
    assert line_of(server, accepted).items() >= (DRAWN | {"status": 202, "outcome": "accepted"}).items()
    client.delete(cancelled.headers["location"])
    for answer, outcome in ((accepted, "completed"), (cancelled, "cancelled")):
        ended = line_about(server, answer.headers["job-id"], None)
        assert (ended["outcome"], ended["seed"], ended["client"]) == (outcome, 5, "127.0.0.1")
    deletion = line_about(server, cancelled.headers["location"], "DELETE")
    assert deletion["outcome"] in ("completed", "accepted")


def test_no_secret_and_no_prompt_is_in_the_whole_log(server: Server, client: httpx.Client) -> None:
    """Also not where something is wrong, and not of query strings."""
    client.post("/txt2img?secret=query", content=b'{"prompt": "a red circle for Zebulon only', headers={"Content-Type": "application/json"})
    client.post("/nothing?secret=query", json=body())
    client.get("/status?secret=query")
    client.post("/txt2img", content=b"{}", headers={b"Content-Type": b"application/json\xff"})
    time.sleep(0.3)
    log = server.log
    for secret in (SECRET_KEY, "Bearer", "Zebulon", "secret=query"):
        assert secret not in log
    assert "Traceback" not in log
