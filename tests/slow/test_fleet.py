"""Three servers with one store: machines that are killed, stopped and started again lose no accepted job and give it one end."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.http.asking import picture_of
from tests.http.following import ask, start
from tests.http.servers import READY_TIMEOUT_S, ROOT, Server, environment, free_port, kill, serve, wait_until_ready
from tests.redis_server import RedisServer, needs_redis_server, started

pytestmark = needs_redis_server
HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")

# A machine counts as lost after 30 s; the rest is for a small machine on which three servers compute.
TAKEN_OVER_S = 150
LONG: dict[str, Any] = {"num_inference_steps": 150, "width": 128, "height": 128, "output_format": "png"}
SHORT: dict[str, Any] = {"num_inference_steps": 40, "output_format": "png"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with started(tmp_path_factory.mktemp("store")) as server:
        yield server


@pytest.fixture(scope="module")
def start_machine(store: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Server]]:
    changes = {"BENTOML_CONFIG": "configuration.yaml", "BENTOML_CONFIG_OPTIONS": "runners.resources.cpu=1", "SD_SHARED_STATE": store.url}
    with ExitStack() as running:

        def start_one() -> Server:
            return running.enter_context(serve(ROOT / "fp32", "service:svc", tmp_path_factory.mktemp("machine"), changes))

        yield start_one


@pytest.fixture(scope="module")
def servers(start_machine: Callable[[], Server]) -> list[Server]:
    with ThreadPoolExecutor(3) as threads:
        return list(threads.map(lambda _: start_machine(), range(3)))


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


def runner_of(store: RedisServer, location: str) -> str:
    with store.client() as client:
        return (client.hget(f"stable_diffusion:{{jobs}}:job:{location.rpartition('/')[2]}", "0.runner") or b"").decode()


def end_of(server: Server, location: str) -> dict[str, object]:
    """The job when it has ended, however long a machine is missed."""
    deadline = time.monotonic() + TAKEN_OVER_S
    while (job := ask(server, location).json())["state"] in ("queued", "running"):
        assert time.monotonic() < deadline, job
        time.sleep(0.2)
    return dict(job)


def test_idle_machines_take_jobs_that_another_has_accepted(servers: list[Server], store: RedisServer) -> None:
    locations = [start(servers[0], seed=seed, **SHORT).headers["location"] for seed in range(40)]
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


def test_nothing_that_was_accepted_is_lost_when_machines_are_killed(
    servers: list[Server], store: RedisServer, start_machine: Callable[[], Server]
) -> None:
    stays, *others = servers
    accepted: list[str] = []
    broken: list[str] = []

    def accept(seed: int) -> None:
        server = servers[seed % len(servers)]
        with suppress(httpx.TransportError):
            accepted.append(start(server, seed=seed, **SHORT).headers["location"])
            return
        broken.append(f"{seed}")

    def wait_for_image(seed: int) -> httpx.Response:
        """A request that waits, and is sent again elsewhere with its key when its machine dies."""
        body = {"prompt": "a red circle", "seed": seed, **SHORT}
        refusals: list[str] = []
        for server in (others[seed % 2], stays):
            with suppress(httpx.TransportError), server.client() as client:
                response = client.post("/txt2img", json=body, headers={"Idempotency-Key": f"waits {seed}"}, timeout=TAKEN_OVER_S)
                if response.status_code == 200:
                    return response
                refusals.append(response.text)
        raise AssertionError(f"no image: {refusals}")

    with ThreadPoolExecutor(12) as threads:
        list(threads.map(accept, range(36)))
        waiting = [threads.submit(wait_for_image, seed) for seed in range(100, 108)]
        for server in others:
            lost = machine_of(server)
            until(lambda lost=lost: any(runner_of(store, location).startswith(lost) for location in accepted))  # type: ignore[misc]
            kill(server.process)
            servers[servers.index(server)] = start_machine()
            list(threads.map(accept, range(200 + len(accepted), 212 + len(accepted))))
        images = [one.result() for one in waiting]
    assert len(accepted) + len(broken) == 36 + 24
    assert broken == [], "servers that run accept"
    for image, seed in zip(images, range(100, 108), strict=True):
        assert image.headers["seed"] == str(seed)
    jobs = [end_of(stays, location) for location in accepted]
    assert [job["state"] for job in jobs] == ["completed"] * len(accepted)
    assert len({job["id"] for job in jobs}) == len(accepted)
    for location in accepted[:6]:
        assert picture_of(ask(servers[2], f"{location}/picture")).size == (64, 64)
    with store.client() as client:
        left = {key.decode().removeprefix("stable_diffusion:{jobs}:").partition(":")[0] for key in client.keys("*")}
    assert left & {"queue", "callers", "waiting_until", "unclaimed", "machine", "runner", "owner", "asynchronous"} == set()


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
