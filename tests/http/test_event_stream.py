"""Progress as server-sent events on the three endpoints, read by httpx from a real server."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from PIL import Image

from tests.http.asking import PROMPT, as_file, refused
from tests.http.following import Event, cancelled, events_of
from tests.http.servers import Server


@contextmanager
def streamed(server: Server, path: str, **request: Any) -> Iterator[Iterator[Event]]:
    with server.client() as client, client.stream("POST", path, headers={"Accept": "text/event-stream"}, **request) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        yield events_of(response)


def body(**fields: object) -> dict[str, object]:
    return {"prompt": PROMPT, "num_inference_steps": 10, "seed": 5, "output_format": "png", **fields}


def test_every_step_is_told_and_the_picture_is_that_of_a_plain_answer(server: Server) -> None:
    with streamed(server, "/txt2img", json=body()) as events:
        told = list(events)
    *progress, (last, completed) = told
    assert {name for name, _ in progress} == {"progress"}
    steps = [data["step"] for _, data in progress]
    assert steps == sorted(set(steps)), "in order, each once"
    assert steps[-1] == 11, "PNDM takes one step more"
    assert len(steps) >= 8
    assert {data["steps"] for _, data in progress} == {11}
    assert {data["attempt"] for _, data in progress} == {1}
    assert all(0 <= data["seconds_left"] < 60 for _, data in progress)
    assert last == "completed"
    assert completed["media_type"] == "image/png"
    assert completed["parameters"]["seed"] == 5
    assert completed["parameters"]["model"] == "demo"
    with server.client() as client:
        plain = client.post("/txt2img", json=body())
    assert base64.b64decode(completed["image"]) == plain.content


@pytest.mark.parametrize("path", ["/img2img", "/inpaint"])
def test_the_endpoints_that_take_pictures_tell_their_steps_too(
    server: Server, path: str, input_picture: Image.Image, right_half_mask: Image.Image
) -> None:
    files = {"img": as_file(input_picture)}
    if path == "/inpaint":
        files["mask"] = as_file(right_half_mask)
    with streamed(server, path, files=files, data={"data": json.dumps(body(strength=0.5))}) as events:
        names = [name for name, _ in events]
    assert names[-1] == "completed"
    assert names.count("progress") >= 3


def test_a_request_that_is_wrong_is_refused_as_without_events(server: Server) -> None:
    with server.client() as client:
        response = client.post("/txt2img", json=body(width=100), headers={"Accept": "text/event-stream"})
    assert "multiple of 8" in refused(response, 400, "width")


def test_who_has_to_wait_is_told_the_place_in_the_queue(server: Server) -> None:
    # More than may ever share a step, and nobody leaves before all have been told where they stand.
    all_told = threading.Barrier(16, timeout=120)

    def first_event(seed: int) -> Event:
        with streamed(server, "/txt2img", json=body(seed=seed, num_inference_steps=150)) as events:
            told = next(events)
            all_told.wait()
            return told

    with ThreadPoolExecutor(16) as pool:
        told = list(pool.map(first_event, range(16)))
    assert {name for name, _ in told} == {"progress", "queued"}
    queued = [data for name, data in told if name == "queued"]
    assert all(data["position"] >= 1 and data["seconds_left"] > 0 for data in queued)


def test_a_client_that_goes_away_in_the_middle_stops_its_job(server: Server) -> None:
    before = cancelled(server)
    with streamed(server, "/txt2img", json=body(num_inference_steps=150)) as events:
        for _ in range(3):
            next(events)
    give_up = time.monotonic() + 30
    while cancelled(server) == before:
        assert time.monotonic() < give_up, server.log
        time.sleep(0.1)


def test_events_come_to_those_that_name_them_and_pictures_in_them_are_of_the_type_that_is_liked(server: Server) -> None:
    with server.client() as client:
        for accept, media_type in (
            ("text/event-stream;q=0, image/png", "image/png"),
            ("*/*", "image/jpeg"),
            ("text/event-stream, image/webp", "text/event-stream"),
        ):
            request = {"prompt": PROMPT, "num_inference_steps": 2}
            answer = client.post("/txt2img", json=request, headers={"Accept": accept})
            assert answer.headers["content-type"].partition(";")[0] == media_type
    assert '"media_type": "image/webp"' in answer.text


def test_previews_without_a_stream_of_events_are_refused(server: Server) -> None:
    with server.client() as client:
        assert "text/event-stream" in refused(client.post("/txt2img", json=body(preview_every_steps=2)), 400, "preview_every_steps")


def test_previews_come_every_so_many_steps_and_only_if_asked_for(server: Server) -> None:
    with streamed(server, "/txt2img", json=body(preview_every_steps=4)) as events:
        told = list(events)
    looks = [data for name, data in events_named(told, "preview")]
    assert [look["step"] for look in looks] == [4, 8]
    for look in looks:
        with Image.open(io.BytesIO(base64.b64decode(look["image"]))) as picture:
            assert (picture.format, picture.size) == ("JPEG", (64, 64))
    with streamed(server, "/txt2img", json=body()) as events:
        assert not list(events_named(list(events), "preview"))


def events_named(told: list[Event], wanted: str) -> Iterator[Event]:
    return ((name, data) for name, data in told if name == wanted)
