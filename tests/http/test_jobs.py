"""Jobs over HTTP: asked for from any worker, followed, cancelled, fetched later, attached to again by a key."""

from __future__ import annotations

import io
import itertools
import re
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from tests.http.asking import PROMPT, as_file, draw, picture_of, redraw, refused
from tests.http.following import NO_WAITING, ask, ended, events_of, events_with_ids_of, start
from tests.http.servers import Server, wait_until_ready


@pytest.fixture
def server(server: Server) -> Server:
    """One precision: `test_doors.py` tries every door in both."""
    return server


def test_every_request_has_an_id_under_which_it_is_found(server: Server) -> None:
    answers = [draw(server, num_inference_steps=1) for _ in range(3)]
    ids = [answer.headers["job-id"] for answer in answers]
    assert len(set(ids)) == 3
    for job_id in ids:
        assert re.fullmatch(r"[0-9a-f]{32}", job_id)
        job = ended(server, f"/jobs/{job_id}")
        assert (job["id"], job["state"], job["picture"]) == (job_id, "completed", None)
    assert "job-id" in draw(server, height=100).headers, "of a refused one too"


def test_a_job_that_nobody_waits_for_is_drawn_and_fetched_from_any_worker(server: Server) -> None:
    taken = start(server, seed=5, num_inference_steps=30)
    assert taken.headers["location"] == f"/jobs/{taken.json()['id']}"
    assert taken.json()["state"] == "queued"
    job = ended(server, taken.headers["location"])
    assert (job["state"], job["step"], job["steps"], job["seconds_left"]) == ("completed", 31, 31, 0.0)
    plain = draw(server, seed=5, num_inference_steps=30)
    for _ in range(4):
        fetched = ask(server, job["picture"], accept="image/png")
        assert picture_of(fetched) == picture_of(plain)
        assert {name: fetched.headers[name] for name in ("seed", "prompt", "scheduler", "model")} == {
            name: plain.headers[name] for name in ("seed", "prompt", "scheduler", "model")
        }
    assert ask(server, job["picture"], accept="image/webp").headers["content-type"] == "image/webp"


def test_the_format_that_was_asked_for_is_that_of_the_picture_that_is_fetched(server: Server) -> None:
    taken = start(server, num_inference_steps=1, output_format="webp")
    assert taken.headers["preference-applied"] == "respond-async"
    job = ended(server, taken.headers["location"])
    for method in ("HEAD", "GET"):
        assert ask(server, job["picture"], method).headers["content-type"] == "image/webp"
    assert refused(ask(server, f"{taken.headers['location']}/events", "PUT"), 405) == "PUT is not allowed here, use GET"


def test_an_inpainted_picture_that_is_fetched_later_keeps_what_was_outside_the_mask(
    server: Server, input_picture: Image.Image, right_half_mask: Image.Image
) -> None:
    files = {"img": as_file(input_picture), "mask": as_file(right_half_mask)}
    with server.client() as client:
        taken = client.post("/inpaint", files=files, data={"data": f'{{"prompt":"{PROMPT}","num_inference_steps":4}}'}, headers=NO_WAITING)
    job = ended(server, taken.headers["location"])
    picture = picture_of(ask(server, job["picture"], accept="image/png"))
    left = (0, 0, 16, 64)
    assert picture.crop(left).tobytes() == input_picture.resize((64, 64), Image.Resampling.LANCZOS).crop(left).tobytes()


def test_a_running_job_says_where_it_is_and_is_cancelled_at_once(server: Server) -> None:
    location = start(server, num_inference_steps=150, height=128, width=128).headers["location"]
    with ThreadPoolExecutor() as threads:
        neighbour = threads.submit(draw, server, num_inference_steps=20)
        deadline = time.monotonic() + 30
        while (running := ask(server, location).json())["step"] < 3:
            assert time.monotonic() < deadline, running
            time.sleep(0.1)
        assert (running["state"], running["steps"]) == ("running", 151)
        assert 0 < running["seconds_left"] < 120
        not_yet = ask(server, f"{location}/picture")
        assert (not_yet.status_code, not_yet.headers["retry-after"]) == (202, "1")
        began = time.monotonic()
        cancelled = ask(server, location, "DELETE")
        assert time.monotonic() - began < 1.5
        assert (cancelled.status_code, cancelled.json()["state"]) == (200, "cancelled")
        assert neighbour.result().status_code == 200
    assert refused(ask(server, f"{location}/picture"), 499) == "the job was cancelled"
    again = ask(server, location, "DELETE")
    assert (again.status_code, again.json()["state"]) == (200, "cancelled")


def test_somebody_who_waits_for_a_cancelled_job_is_told(server: Server) -> None:
    body = {"prompt": PROMPT, "num_inference_steps": 150}
    with server.client() as client, client.stream("POST", "/txt2img", json=body, headers={"Accept": "text/event-stream"}) as response:
        events = events_of(response)
        next(events)
        ask(server, f"/jobs/{response.headers['job-id']}", "DELETE")
        *_, (name, told) = events
    assert (name, told["error"]["type"]) == ("error", "cancelled")


def test_the_events_of_a_job_are_followed_by_whoever_knows_its_id(server: Server) -> None:
    location = start(server, num_inference_steps=60, preview_every_steps=5, seed=8).headers["location"]
    with (
        server.client() as client,
        client.stream("GET", f"{location}/events", headers={"Accept": "text/event-stream, image/png"}) as response,
    ):
        assert response.headers["content-type"].startswith("text/event-stream")
        events = list(events_of(response))
    names = [name for name, _ in events]
    assert names[-1] == "completed"
    assert {"progress", "preview"} <= set(names)
    steps = [data["step"] for name, data in events if name == "progress"]
    assert steps == sorted(set(steps))
    completed = events[-1][1]
    assert (completed["media_type"], completed["parameters"]["seed"]) == ("image/png", 8)


def test_a_client_of_a_jobs_events_goes_on_where_its_connection_broke(server: Server) -> None:
    location = start(server, num_inference_steps=150, preview_every_steps=20).headers["location"]
    read: list[tuple[str, dict[str, Any], str]] = []
    last_id = "a client sends none at first, and here one that nobody has given it"
    while last_id != "ended":
        with server.client() as client, client.stream("GET", f"{location}/events", headers={"Last-Event-ID": last_id}) as response:
            assert response.status_code == 200
            read += itertools.islice(events_with_ids_of(response), 2)  # then it breaks
            last_id = read[-1][2]
    *names, last = [name for name, *_ in read]
    assert (last, set(names)) == ("completed", {"progress", "preview"})
    ids = [event_id for *_, event_id in read]
    assert len(ids) == len(set(ids))
    steps = [data["step"] for name, data, _ in read if name == "progress"]
    assert steps == sorted(set(steps))
    assert len(steps) >= 3
    over = ask(server, f"{location}/events", **{"Last-Event-ID": "ended"})
    assert (over.status_code, over.content) == (204, b"")
    for no_id in ("", "ended too", "9" * 4000, "1.\xe9.0."):
        with server.client() as client:
            again = client.get(f"{location}/events", headers={b"Last-Event-ID": no_id.encode("latin-1")})
        assert [name for name, _ in events_of(again)] == ["completed"]


def test_the_events_of_a_request_with_a_key_are_continued_as_those_of_its_job(server: Server) -> None:
    body = {"prompt": PROMPT, "num_inference_steps": 100}
    headers = {"Idempotency-Key": f"continued {time.time()}", "Accept": "text/event-stream"}
    with server.client() as client, client.stream("POST", "/txt2img", json=body, headers=headers) as response:
        job_id = response.headers["job-id"]
        _, first, last_id = next(events_with_ids_of(response))
    with server.client() as client:
        rest = client.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": last_id})
    read = list(events_of(rest))
    assert read[-1][0] == "completed"
    assert all(data["step"] > first["step"] for name, data in read if name == "progress")


def test_a_client_that_vanishes_from_the_events_does_not_end_the_job(server: Server) -> None:
    location = start(server, num_inference_steps=40).headers["location"]
    with server.client() as client, client.stream("GET", f"{location}/events") as response:
        next(events_of(response))
    assert ended(server, location)["state"] == "completed"


def test_a_key_attaches_to_the_job_that_is_running_and_pays_once(server: Server) -> None:
    key = f"key {time.time()}"
    body = {"prompt": PROMPT, "num_inference_steps": 40, "height": 96, "width": 96}
    headers = {"Idempotency-Key": key, "Accept": "image/png"}

    def wait() -> httpx.Response:
        with server.client() as client:
            return client.post("/txt2img", json=body, headers=headers)

    with server.client() as impatient, pytest.raises(httpx.ReadTimeout):
        impatient.post("/txt2img", json=body, headers=headers, timeout=0.2)
    with ThreadPoolExecutor() as threads:
        first, second = threads.submit(wait), threads.submit(wait)
        answers = [first.result(), second.result(), wait()]
    assert len({answer.headers["job-id"] for answer in answers}) == 1
    assert len({answer.headers["seed"] for answer in answers}) == 1, "a random one, drawn once"
    assert len({answer.content for answer in answers}) == 1
    with server.client() as client:
        other = client.post("/txt2img", json={**body, "guidance_scale": 3}, headers=headers)
        assert "another request" in refused(other, 422, "Idempotency-Key")
        assert "printable" in refused(client.post("/txt2img", json=body, headers={"Idempotency-Key": "x" * 300}), 400, "Idempotency-Key")
    streaming = {**headers, "Accept": "text/event-stream"}
    with server.client() as client, client.stream("POST", "/txt2img", json=body, headers=streaming) as response:
        assert response.headers["job-id"] == answers[0].headers["job-id"]
        assert list(events_of(response))[-1][0] == "completed"


def test_what_is_no_job_is_not_found_and_costs_no_series_of_metrics(server: Server) -> None:
    for path in ("/jobs/0123456789abcdef0123456789abcdef", "/jobs/x/picture", "/jobs/x/events"):
        assert "no such job" in refused(ask(server, path), 404)
    assert "no such job" in refused(ask(server, "/jobs/x", "DELETE"), 404)
    for path in ("/jobs/x/y/z", "/jobs/%2e%2e%2fetc", "/jobs/"):
        assert "no such path" in refused(ask(server, path), 404)
    wrong = ask(server, "/jobs/x", "PUT")
    assert refused(wrong, 405) == "PUT is not allowed here, use DELETE or GET"
    assert wrong.headers["allow"] == "DELETE, GET, HEAD"
    assert set(re.findall(r'endpoint="(/jobs[^"]*)"', ask(server, "/metrics").text)) <= {
        "/jobs/{job_id}",
        "/jobs/{job_id}/events",
        "/jobs/{job_id}/picture",
    }


def test_a_picture_that_was_sent_in_the_answer_is_not_kept(server: Server) -> None:
    job_id = draw(server, num_inference_steps=1).headers["job-id"]
    ended(server, f"/jobs/{job_id}")
    assert "is not kept" in refused(ask(server, f"/jobs/{job_id}/picture"), 404)


def test_a_refused_request_is_no_job_even_if_nobody_would_wait(server: Server, input_picture: Image.Image) -> None:
    with server.client() as client:
        response = client.post("/txt2img", json={"prompt": PROMPT, "height": 100}, headers=NO_WAITING)
    refused(response, 400, "height")
    refused(ask(server, f"/jobs/{response.headers['job-id']}"), 404)
    refused(redraw(server, "/img2img", {"img": b"no picture"}), 400, "img")


def store_of(server: Server) -> sqlite3.Connection:
    """What the server knows of its jobs, to make time pass and places go."""
    (worker,) = [process for process in family_of(server) if "bentoml_cli.worker.runner" in process.cmdline()]
    return sqlite3.connect(Path(worker.environ()["SD_SHARED_FOLDER"]) / "jobs.sqlite", timeout=10)


def family_of(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def test_a_picture_that_was_kept_long_enough_is_gone(server: Server) -> None:
    job = ended(server, start(server, num_inference_steps=1).headers["location"])
    assert ask(server, job["picture"]).status_code == 200
    with closing(store_of(server)) as store, store:
        store.execute("UPDATE jobs SET ended_at = ended_at - 3601 WHERE id = ?", (job["id"],))
    assert "for 60 minutes" in refused(ask(server, job["picture"]), 410)
    assert ask(server, f"/jobs/{job['id']}").json()["picture"] is None


def test_too_many_jobs_that_nobody_waits_for_are_refused_until_there_is_room(server: Server) -> None:
    with closing(store_of(server)) as store, store:
        store.executemany(
            "INSERT INTO jobs (id, image_index, owner, asynchronous, task, runner, state, position, step, steps, seconds_left, created_at)"
            " VALUES (?, 0, 'test', 1, '{}', 99, 'running', 0, 1, 2, 7.2, 0)",
            [(f"in the way {number}",) for number in range(128)],  # twice the limit: below that each caller has a share
        )
    try:
        with server.client() as client:
            full = client.post("/txt2img", json={"prompt": PROMPT}, headers=NO_WAITING)
        assert "128 jobs" in refused(full, 429)
        assert full.headers["retry-after"] == "7"
        assert draw(server, num_inference_steps=1).status_code == 200, "who waits is served"
    finally:
        with closing(store_of(server)) as store, store:
            store.execute("DELETE FROM jobs WHERE owner = 'test'")
    start(server, num_inference_steps=1)


def test_a_job_survives_the_workers_that_took_it(server: Server) -> None:
    location = start(server, num_inference_steps=100, seed=4).headers["location"]
    workers = [
        child for child in psutil.Process(server.process.pid).children(recursive=True) if "http_api_server" in " ".join(child.cmdline())
    ]
    assert len(workers) == 2
    for worker in workers:
        worker.kill()
    psutil.wait_procs(workers, timeout=10)
    wait_until_ready(server)
    job = ended(server, location)
    assert job["state"] == "completed"
    fetched = ask(server, job["picture"])
    assert fetched.headers["seed"] == "4"
    assert Image.open(io.BytesIO(fetched.content)).size == (64, 64)
