"""Two servers that share a real Redis or Valkey, over HTTP: any of them answers, limits hold across them, and the store may go away."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.http.asking import PROMPT, draw, picture_of
from tests.http.following import NO_WAITING, ask, ended, events_of, events_with_ids_of, start
from tests.http.log_lines import lines_of
from tests.http.servers import ROOT, Server, serve
from tests.redis_server import RedisServer, Way, needs_redis_server, started, way_to

pytestmark = needs_redis_server

LONGEST_CALL_S = 5
KEY = "correct-horse-battery-staple"
KEY_OF_BOB = "staple-battery-horse-correct"
BODY = {"prompt": PROMPT, "num_inference_steps": 2, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with started(tmp_path_factory.mktemp("store")) as server:
        yield server


@pytest.fixture(scope="module")
def way(store: RedisServer) -> Iterator[Way]:
    """Both servers reach the store this way."""
    with way_to(store) as way:
        yield way


@pytest.fixture(scope="module")
def servers(way: Way, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    changes = {
        "BENTOML_CONFIG": "configuration.yaml",
        # One core each: on a small machine two models that both use all cores slow each other down many times.
        "BENTOML_CONFIG_OPTIONS": "runners.resources.cpu=1",
        "SD_SHARED_STATE": way.url,
        "SD_RATE_LIMIT": "6000",
    }
    with ExitStack() as running, ThreadPoolExecutor(2) as threads:
        homes = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
        starting = [threads.submit(running.enter_context, serve(ROOT / "fp32", "service:svc", home, changes)) for home in homes]
        first, second = (one.result() for one in starting)
        yield first, second


def post(server: Server, body: dict[str, object], **headers: str) -> httpx.Response:
    with server.client() as client:
        return client.post("/txt2img", json=body, headers={name.replace("_", "-"): value for name, value in headers.items()})


def test_a_job_is_known_followed_and_fetched_at_the_other_server_without_a_cookie(servers: tuple[Server, Server]) -> None:
    first, second = servers
    # Long enough for the progress that is stored twice a second.
    accepted = start(first, seed=5, num_inference_steps=120, preview_every_steps=5, output_format="png")
    location = accepted.headers["location"]
    with second.client() as client, client.stream("GET", f"{location}/events") as response:
        events = list(events_of(response))
        assert "set-cookie" not in response.headers
    assert events[-1][0] == "completed"
    assert {"progress", "preview"} <= {name for name, _ in events}
    job = ended(second, location)
    assert (job["state"], job["step"], job["steps"]) == ("completed", 121, 121)
    fetched = ask(second, job["picture"])
    assert picture_of(fetched) == picture_of(draw(first, seed=5, num_inference_steps=120))
    assert fetched.content == ask(first, job["picture"]).content
    for response in (accepted, fetched, ask(second, location)):
        assert "set-cookie" not in response.headers


def test_a_client_that_reads_a_jobs_events_at_both_servers_in_turn_gets_each_once(servers: tuple[Server, Server]) -> None:
    location = start(servers[0], num_inference_steps=150).headers["location"]
    ids, steps, names = [""], [], []
    turns = itertools.cycle(servers)
    while ids[-1] != "ended":
        headers = {"Last-Event-ID": ids[-1]}
        with next(turns).client() as client, client.stream("GET", f"{location}/events", headers=headers) as response:
            for name, data, event_id in itertools.islice(events_with_ids_of(response), 1):
                ids.append(event_id)
                names.append(name)
                if name == "progress":
                    steps.append(data["step"])
    assert names.count("completed") == 1
    assert len(ids) == len(set(ids))
    assert steps == sorted(set(steps))
    assert len(steps) >= 2
    for server in servers:
        assert ask(server, f"{location}/events", **{"Last-Event-ID": "ended"}).status_code == 204


def test_a_job_is_cancelled_at_the_other_server(servers: tuple[Server, Server]) -> None:
    first, second = servers
    location = start(first, num_inference_steps=150, height=128, width=128).headers["location"]
    began_s = time.monotonic()
    cancelled = ask(second, location, "DELETE")
    assert (cancelled.status_code, cancelled.json()["state"]) == (200, "cancelled")
    assert time.monotonic() - began_s < 2
    assert ask(first, location).json()["state"] == "cancelled"


def test_a1111s_progress_and_interrupt_reach_what_the_caller_does_elsewhere(servers: tuple[Server, Server]) -> None:
    first, second = servers
    with ThreadPoolExecutor() as threads:
        body = {"prompt": PROMPT, "steps": 150, "width": 128, "height": 128}

        def ask_first() -> httpx.Response:
            with first.client() as client:
                return client.post("/sdapi/v1/txt2img", json=body)

        drawing = threads.submit(ask_first)
        deadline = time.monotonic() + 30
        while not (progress := ask(second, "/sdapi/v1/progress").json())["state"]["sampling_step"]:
            assert time.monotonic() < deadline, progress
            time.sleep(0.05)
        assert progress["state"]["job_count"] == 1
        assert ask(second, "/sdapi/v1/interrupt", "POST").status_code == 200
        assert drawing.result().status_code == 499
    while ask(second, "/sdapi/v1/progress").json()["state"]["job_count"]:  # who waits is told first
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_key_sent_to_both_servers_at_once_starts_one_job_each_time(servers: tuple[Server, Server]) -> None:
    with ThreadPoolExecutor(4) as threads:
        for number in range(50):
            asked = [threads.submit(post, server, BODY, Idempotency_Key=f"both {number}", Accept="image/png") for server in servers]
            answers = [one.result() for one in asked]
            assert [answer.status_code for answer in answers] == [200, 200]
            assert len({answer.headers["job-id"] for answer in answers}) == 1
            assert len({answer.content for answer in answers}) == 1


def test_a_request_that_is_sent_again_elsewhere_before_it_is_answered_attaches(servers: tuple[Server, Server]) -> None:
    first, second = servers
    body = {**BODY, "num_inference_steps": 60}
    with first.client() as impatient, pytest.raises(httpx.ReadTimeout):
        impatient.post("/txt2img", json=body, headers={"Idempotency-Key": "again"}, timeout=0.3)
    again = post(second, body, Idempotency_Key="again")
    assert again.status_code == 200
    assert post(first, body, Idempotency_Key="again").content == again.content
    assert post(second, BODY, Idempotency_Key="again").json()["error"]["type"] == "idempotency_mismatch"


def backlog_s(server: Server) -> tuple[float, float]:
    """Seconds of work that wait for the server, and those of them that are in its own hands."""
    page = ask(server, "/metrics").text
    gauges = [re.findall(rf"(?m)^stable_diffusion_{name}_seconds (\S+)$", page) for name in ("backlog", "workload")]
    (backlog,), (workload,) = gauges
    return float(backlog), float(workload)


def test_jobs_that_wait_for_any_machine_are_seconds_of_work_at_each_and_none_when_they_have_ended(servers: tuple[Server, Server]) -> None:
    first, second = servers
    for server in servers:
        draw(server)  # both have measured their steps
    assert [backlog_s(server)[0] for server in servers] == pytest.approx([0, 0], abs=0.01)
    locations = [start(first, num_inference_steps=150, width=128, height=128).headers["location"] for _ in range(60)]
    waiting = [backlog_s(server) for server in servers]
    for backlog, own in waiting:
        assert backlog > own + 1 > 1, waiting  # each has as many jobs as share a step, and half of the others
    for location in locations:
        ask(first, location, "DELETE")
    deadline = time.monotonic() + 20
    while max(backlog_s(server)[0] for server in servers) > 0.01:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def shown(server: Server) -> tuple[bool, float]:
    """What the page of the status and the metrics say of the shared state."""
    reachable = ask(server, "/status").json()["shared_state"]["reachable"]
    (gauge,) = re.findall(r"(?m)^stable_diffusion_shared_state_reachable (\S+)$", ask(server, "/metrics").text)
    return reachable, float(gauge)


def assert_back(server: Server) -> None:
    """Until both API workers have said so many times in a row: each has a connection of its own."""
    deadline = time.monotonic() + 20
    in_a_row = 0
    while in_a_row < 20:
        in_a_row = in_a_row + 1 if shown(server) == (True, 1.0) else 0
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_away(server: Server, because: str) -> None:
    """Images that somebody waits for are drawn; what needs the shared state is refused, and nothing hangs."""
    for attempt in range(3):
        began_s = time.monotonic()
        assert post(server, BODY).status_code == 200
        assert time.monotonic() - began_s < LONGEST_CALL_S + 3
        for headers in ({"Prefer": "respond-async"}, {"Idempotency_Key": f"while away {attempt}"}):
            began_s = time.monotonic()
            refused = post(server, BODY, **headers)
            assert time.monotonic() - began_s < LONGEST_CALL_S
            error = refused.json()["error"]
            assert (refused.status_code, error["type"]) == (503, "shared_state_unavailable")
            assert because in error["message"]
            assert int(refused.headers["retry-after"]) >= 1
    assert ask(server, "/readyz").status_code == 200, "it generates"


def test_while_the_store_is_killed_servers_draw_and_say_so_and_jobs_are_known_again_afterwards(
    servers: tuple[Server, Server], store: RedisServer
) -> None:
    first, second = servers
    assert shown(first) == (True, 1.0)
    known = ended(first, start(first, seed=9).headers["location"])
    running = start(second, num_inference_steps=100, seed=7).headers["location"]
    store.kill()
    for server in servers:
        assert_away(server, "cannot be reached")
    assert shown(first) == (False, 0.0)
    lost = ask(first, f"/jobs/{known['id']}")
    assert (lost.status_code, lost.json()["error"]["type"]) == (503, "shared_state_unavailable")
    store.start()
    for server in servers:
        assert_back(server)
    assert ask(second, known["picture"]).headers["seed"] == "9"
    assert ended(first, running)["state"] == "completed", "drawn while the store was away"
    assert ask(first, f"{running}/picture").headers["seed"] == "7"
    assert ended(first, start(second).headers["location"])["state"] == "completed"
    for server in servers:
        assert len(re.findall("The shared state is away", server.log)) >= 1
        assert KEY not in server.log


def test_while_the_port_of_the_store_is_blocked_nothing_hangs(servers: tuple[Server, Server], way: Way) -> None:
    first, _ = servers
    way.is_blocked = True
    try:
        assert_away(first, "does not answer")
        assert shown(first) == (False, 0.0)
    finally:
        way.is_blocked = False
    for server in servers:
        assert_back(server)
    start(first)


def test_a_slow_store_slows_questions_down_and_no_steps(servers: tuple[Server, Server], way: Way) -> None:
    first, second = servers
    draw(first, num_inference_steps=60, seed=3)
    began_s = time.monotonic()
    alone = draw(first, num_inference_steps=60, seed=3)
    took_s = time.monotonic() - began_s
    way.delay_s = 0.1
    try:
        began_s = time.monotonic()
        slow = draw(first, num_inference_steps=60, seed=3)
        assert time.monotonic() - began_s < 2 * took_s + 1
        assert slow.content == alone.content
        assert ended(second, start(first).headers["location"])["state"] == "completed"
    finally:
        way.delay_s = 0.0


def test_a_full_store_is_a_clear_refusal(servers: tuple[Server, Server], store: RedisServer) -> None:
    first, second = servers
    known = ended(first, start(first, seed=9).headers["location"])
    with store.client() as client:
        client.config_set("maxmemory", 1)
        try:
            assert_away(second, "is full")
            assert ask(second, known["picture"]).headers["seed"] == "9"
        finally:
            client.config_set("maxmemory", 0)
    assert ended(second, start(first).headers["location"])["state"] == "completed"


def end_line(job_id: str, machines: Sequence[Server]) -> dict[str, Any]:
    """The line of a job's end, in the log of the machine that has generated it."""
    deadline = time.monotonic() + 60
    while not (found := [line for machine in machines for line in lines_of(machine, job_id) if "method" not in line]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (line,) = found
    return line


def test_two_servers_let_a_key_in_as_often_as_one_and_log_whose_job_they_have_generated(
    servers: tuple[Server, Server], way: Way, tmp_path: Path
) -> None:
    changes = {"SD_SHARED_STATE": way.url, "SD_RATE_LIMIT": "30", "SD_API_KEYS": f"alice:{KEY},bob:{KEY_OF_BOB}"}
    changes |= {"BENTOML_CONFIG": "configuration.yaml", "BENTOML_CONFIG_OPTIONS": "runners.resources.cpu=1"}
    wrong = {**BODY, "height": 1}  # counted all the same, and quick
    with ExitStack() as running, ThreadPoolExecutor(8) as threads:
        starting = [
            threads.submit(running.enter_context, serve(ROOT / "fp32", "service:svc", tmp_path / name, changes)) for name in ("a", "b")
        ]
        both = [one.result() for one in starting]
        began_s = time.monotonic()
        asked = [threads.submit(post, both[number % 2], wrong, X_API_Key=KEY) for number in range(80)]
        statuses = [one.result().status_code for one in asked]
        took_s = time.monotonic() - began_s
        jobs = [post(both[0], BODY, X_API_Key=KEY_OF_BOB, Prefer="respond-async").headers["job-id"] for _ in range(6)]
        ends = [end_line(job_id, (*servers, *both)) for job_id in jobs]
    for end in ends:
        assert (end["key"], end["client"], end["outcome"]) == ("bob", "127.0.0.1", "completed")
    assert set(statuses) == {400, 429}
    assert 30 <= statuses.count(400) <= 31 + took_s / 2


def test_a_server_whose_shared_state_is_missing_does_not_start(tmp_path: Path) -> None:
    url = f"redis://:{KEY}@127.0.0.1:1"
    with (
        pytest.raises(RuntimeError, match="Not started: SD_SHARED_STATE: the store at 127.0.0.1:1 cannot be reached") as told,
        serve(ROOT / "fp32", "service:svc", tmp_path, {"SD_SHARED_STATE": url, "BENTOML_CONFIG": "configuration.yaml"}),
    ):
        pass
    assert KEY not in str(told.value)


def test_jobs_of_a_server_that_is_stopped_are_still_known(servers: tuple[Server, Server], way: Way, tmp_path: Path) -> None:
    changes = {"SD_SHARED_STATE": way.url, "BENTOML_CONFIG": "configuration.yaml", "BENTOML_CONFIG_OPTIONS": "runners.resources.cpu=1"}
    with serve(ROOT / "fp32", "service:svc", tmp_path, changes) as third:
        location = start(third, seed=3).headers["location"]
        with third.client() as client:
            waiting = client.post("/txt2img", json=BODY, headers=NO_WAITING)
        assert waiting.status_code == 202
    first, second = servers
    assert ended(first, waiting.headers["location"])["state"] == "completed"
    assert ask(second, f"{location}/picture").headers["seed"] == "3"
