"""Three servers with one store: machines that are killed, stopped and started again lose no accepted job and give it one end."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import ImageChops

from tests.http.asking import picture_of
from tests.http.following import ask, start
from tests.http.servers import PLAIN_HTTP, READY_TIMEOUT_S, ROOT, Server, environment, free_port, kill, serve, wait_until_ready
from tests.redis_server import RedisServer, needs_redis_server, started
from tests.slow.test_balancer import HAPROXY, haproxy

pytestmark = needs_redis_server

# A machine counts as lost after 30 s; the rest is for a small machine on which three servers compute.
TAKEN_OVER_S = 150
ALL_ENDED_S = 500
JOBS = 300  # that nobody waits for; a third as many requests wait
PREFIX = "stable_diffusion:{jobs}:"
LONG: dict[str, Any] = {"num_inference_steps": 150, "width": 128, "height": 128, "output_format": "png"}
SHORT: dict[str, Any] = {"num_inference_steps": 20, "output_format": "png"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with started(tmp_path_factory.mktemp("store")) as server:
        yield server


@pytest.fixture(scope="module")
def start_machine(store: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int | None], Server]]:
    changes = {"BENTOML_CONFIG": "configuration.yaml", "BENTOML_CONFIG_OPTIONS": "runners.resources.cpu=1", "SD_SHARED_STATE": store.url}
    with ExitStack() as running:

        def start_one(port: int | None) -> Server:
            return running.enter_context(serve(ROOT / "fp32", "service:svc", tmp_path_factory.mktemp("machine"), changes, port))

        yield start_one


@pytest.fixture(scope="module")
def servers(start_machine: Callable[[int | None], Server]) -> list[Server]:
    with ThreadPoolExecutor(3) as threads:
        return list(threads.map(start_machine, [None] * 3))


def family_of(server: Server) -> list[psutil.Process]:
    first = psutil.Process(server.process.pid)
    return [first, *first.children(recursive=True)]


def model_process_of(server: Server) -> psutil.Process:
    (worker,) = [process for process in family_of(server) if "bentoml_cli.worker.runner" in process.cmdline()]
    return worker


def machine_of(server: Server) -> str:
    """How the store names the server."""
    return hashlib.sha256(family_of(server)[1].environ()["SD_SHARED_FOLDER"].encode()).hexdigest()[:16]


def until(condition: Callable[[], object], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def key_of(location: str) -> str:
    return f"{PREFIX}job:{location.rpartition('/')[2]}"


def runner_of(store: RedisServer, location: str) -> str:
    with store.client() as client:
        return (client.hget(key_of(location), "0.runner") or b"").decode()


def end_of(server: Server, location: str) -> dict[str, object]:
    """The job when it has ended, however long a machine is missed."""
    deadline = time.monotonic() + TAKEN_OVER_S
    while (job := ask(server, location).json())["state"] in ("queued", "running"):
        assert time.monotonic() < deadline, job
        time.sleep(0.2)
    return dict(job)


def test_idle_machines_take_jobs_that_another_has_accepted(servers: list[Server], store: RedisServer) -> None:
    locations = [start(servers[0], seed=seed, num_inference_steps=60).headers["location"] for seed in range(40)]
    assert all(end_of(servers[1], location)["state"] == "completed" for location in locations)
    took = {runner_of(store, location).partition("/")[0] for location in locations}
    assert took == {machine_of(server) for server in servers}


def test_a_machine_that_was_only_stopped_comes_too_late_and_the_image_is_the_same_to_the_byte(
    servers: list[Server], store: RedisServer
) -> None:
    undisturbed = start(servers[0], seed=11, **LONG).headers["location"]
    assert end_of(servers[0], undisturbed)["state"] == "completed"
    expected = ask(servers[0], f"{undisturbed}/picture").content
    location = start(servers[0], seed=11, **LONG).headers["location"]
    until(lambda: runner_of(store, location))
    owner = runner_of(store, location)
    (stopped,) = [server for server in servers if owner.startswith(machine_of(server))]
    other = next(server for server in servers if server is not stopped)
    family = family_of(stopped)
    for process in family:
        process.suspend()
    try:
        assert ask(other, location).json()["state"] in ("queued", "running")
        assert end_of(other, location)["state"] == "completed"
    finally:
        for process in family:
            process.resume()
    ended_at = ask(other, location).json()["ended_at"]
    assert not runner_of(store, location).startswith(machine_of(stopped))
    assert ask(other, f"{location}/picture").content == expected
    with stopped.client() as client:
        until(lambda: client.get("/readyz").status_code == 200)
    time.sleep(3)  # time for what the stopped machine still says
    job = ask(stopped, location).json()
    assert (job["state"], job["ended_at"]) == ("completed", ended_at)
    assert ask(stopped, f"{location}/picture").content == expected
    own = start(stopped, seed=12, num_inference_steps=2).headers["location"]
    assert end_of(stopped, own)["state"] == "completed"


def test_a_job_whose_model_process_dies_is_generated_elsewhere_at_once(servers: list[Server], store: RedisServer) -> None:
    location = start(servers[0], seed=13, **LONG).headers["location"]
    until(lambda: runner_of(store, location))
    owner = runner_of(store, location)
    (unlucky,) = [server for server in servers if owner.startswith(machine_of(server))]
    model_process_of(unlucky).kill()
    until(lambda: runner_of(store, location) not in ("", owner), 20)
    assert end_of(servers[0], location)["state"] == "completed"
    assert ask(unlucky, f"{location}/picture").headers["seed"] == "13"
    wait_until_ready(unlucky)


def has_got_over(store: RedisServer, lost: str) -> bool:
    """Whether all that a machine had when it was killed has been taken away from it and has ended."""
    with store.client() as client:
        if client.keys(f"{PREFIX}runner:{lost}/*") or client.keys(f"{PREFIX}machine:{lost}"):
            return False
        jobs = [client.hmget(key, "0.redraws", "0.ended_at") for key in client.keys(f"{PREFIX}job:*")]
    return all(ended_at or not int(redraws or 0) for redraws, ended_at in jobs)


@dataclass
class Ledger:
    """What clients have sent to the balancer and what became of it. A client sends a request again until it has its response."""

    url: str
    accepted: dict[int, str] = field(default_factory=dict)  # the addresses of asynchronous jobs by seed
    images: dict[int, httpx.Response] = field(default_factory=dict)  # of requests that waited, by seed
    refused: list[str] = field(default_factory=list)

    def accept(self, seed: int) -> None:
        # With a key: a machine may die after it has accepted a job and before it has said so.
        if (response := self._send(seed, {"Prefer": "respond-async", "Idempotency-Key": f"accepted {seed}"}, 202)) is not None:
            self.accepted[seed] = response.headers["location"]

    def wait(self, seed: int) -> None:
        if (response := self._send(seed, {"Idempotency-Key": f"waits {seed}", "Accept": "image/png"}, 200)) is not None:
            self.images[seed] = response

    def _send(self, seed: int, headers: dict[str, str], expected: int) -> httpx.Response | None:
        deadline = time.monotonic() + ALL_ENDED_S
        while time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                body = {"prompt": "a red circle", "seed": seed, **SHORT}
                response = httpx.post(f"{self.url}/txt2img", json=body, headers=headers, timeout=TAKEN_OVER_S, **PLAIN_HTTP)
                if response.status_code == expected:
                    return response
                if response.status_code not in (429, 502, 503):  # too many jobs; a server that has died; one that is starting
                    self.refused.append(response.text)
                    return None
            time.sleep(0.5)
        self.refused.append("no response in time")
        return None


@pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed")
def test_the_ledger_comes_out_even_while_one_machine_after_the_other_is_killed_and_started_again(
    servers: list[Server], store: RedisServer, start_machine: Callable[[int | None], Server], tmp_path: Path
) -> None:
    ports = {name: server.address[1] for name, server in zip("abc", servers, strict=True)}
    with store.client() as client:
        earlier = len(client.keys(f"{PREFIX}job:*"))
    with haproxy(tmp_path, ports) as balancer, ThreadPoolExecutor(24) as clients:
        ledger = Ledger(balancer.url)
        sending = []
        for seed in range(JOBS):
            sending.append(clients.submit(ledger.accept, seed))
            if seed % 3 == 0:
                sending.append(clients.submit(ledger.wait, 1000 + seed))
        for server in servers:
            had, lost = len(ledger.accepted), machine_of(server)
            until(lambda had=had: len(ledger.accepted) > min(had + 30, JOBS - 1), 120)  # type: ignore[misc]
            kill(server.process)
            start_machine(server.address[1])
            # A job that is hit three times fails, which is not what this test is about.
            until(lambda lost=lost: has_got_over(store, lost), TAKEN_OVER_S)  # type: ignore[misc]
        for one in sending:
            one.result()
        assert ledger.refused == []
        assert (len(ledger.accepted), len(ledger.images)) == (JOBS, JOBS // 3)
        behind = Server(ledger.url, tmp_path / "haproxy.log", servers[0].process)
        for seed, location in ledger.accepted.items():
            assert end_of(behind, location)["state"] == "completed"
            assert ask(behind, f"{location}/picture").headers["seed"] == str(seed)
        assert all(image.headers["seed"] == str(seed) for seed, image in ledger.images.items())
        with store.client() as client:
            redrawn = [seed for seed, location in ledger.accepted.items() if int(client.hget(key_of(location), "0.redraws") or 0)]
            kinds = [key.decode().removeprefix(PREFIX).partition(":")[0] for key in client.keys("*")]
        assert redrawn, "some were under way on the machines that were killed"
        assert kinds.count("job") == earlier + JOBS + JOBS // 3, "no job twice"
        assert set(kinds) & {"queue", "callers", "waiting_until", "unclaimed", "machine", "runner", "owner", "asynchronous"} == set()
        for seed in redrawn[:5]:
            undisturbed = httpx.post(
                f"{ledger.url}/txt2img",
                json={"prompt": "a red circle", "seed": seed, **SHORT},
                headers={"Accept": "image/png"},
                timeout=TAKEN_OVER_S,
                **PLAIN_HTTP,
            )
            difference = ImageChops.difference(picture_of(ask(behind, f"{ledger.accepted[seed]}/picture")), picture_of(undisturbed))
            assert np.asarray(difference).max() <= 2, "as in any other batch"


@pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed")
def test_make_fleet_starts_servers_behind_one_address_and_ends_them_together(tmp_path: Path) -> None:
    port = free_port()
    planned = subprocess.run(["make", "--dry-run", "fleet", "N=2", f"PORT={port}"], cwd=ROOT, capture_output=True, text=True, check=True)
    command = f"-m benchmarks.fleet --servers 2 --port {port} --precision fp32"
    assert command in planned.stdout
    with (tmp_path / "fleet.log").open("w") as log:
        fleet = subprocess.Popen(
            [sys.executable, *command.split()], cwd=ROOT, env=environment(tmp_path), stdout=log, stderr=subprocess.STDOUT
        )
    family: list[psutil.Process] = []
    try:
        until(lambda: "Ctrl+C stops" in (tmp_path / "fleet.log").read_text() or fleet.poll() is not None, READY_TIMEOUT_S)
        assert fleet.poll() is None, (tmp_path / "fleet.log").read_text()
        family = psutil.Process(fleet.pid).children(recursive=True)
        behind = Server(f"http://127.0.0.1:{port}", tmp_path / "fleet.log", fleet)
        locations = [start(behind, seed=seed, num_inference_steps=4).headers["location"] for seed in range(6)]
        answers = [ask(behind, location) for location in locations for _ in range(4)]
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.headers["served-by"] for answer in answers} == {"server-1", "server-2"}
        assert all(end_of(behind, location)["state"] == "completed" for location in locations)
        fleet.send_signal(signal.SIGINT)
        assert fleet.wait(READY_TIMEOUT_S) == 0
        assert psutil.wait_procs(family, timeout=10)[1] == []
    finally:
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if fleet.poll() is None:
            fleet.kill()
        fleet.wait()
