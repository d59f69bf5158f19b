"""Two servers from the same bento behind a real HAProxy, set up as the load balancer on AWS is: least connections, health by /readyz.

Under mixed load one server is killed, and one is drained, stopped and replaced. Every request is accounted for.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.http.servers import PLAIN_HTTP, ROOT, Server, build_bento, free_port, kill, serve, stop

HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")
pytestmark = pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed")

CLIENTS = 6
REQUEST_TIMEOUT_S = 60
TURN_TIMEOUT_S = 30
# The load balancer responds with 502 or 503 if a server died during a request or is unreachable. Until its health check notices,
# a client may get that more than once.
TRIES = 4
RETRY_PAUSE_S = 0.4


@dataclass(frozen=True)
class Balancer:
    url: str
    control: Path

    def order(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.control))
            connection.sendall(command.encode() + b"\n")
            response = b""
            while part := connection.recv(65536):
                response += part
        return response.decode()

    def status(self, name: str) -> dict[str, str]:
        header, *rows = self.order("show stat").strip().splitlines()
        names = header.lstrip("# ").split(",")
        return next(row for row in (dict(zip(names, line.split(","), strict=False)) for line in rows) if row["svname"] == name)

    def wait_until(self, name: str, column: str, value: str) -> None:
        deadline = time.monotonic() + TURN_TIMEOUT_S
        while self.status(name)[column] != value:
            assert time.monotonic() < deadline, f"{name} has {column} {self.status(name)[column]}, not {value}"
            time.sleep(0.1)


@contextmanager
def haproxy(folder: Path, ports: dict[str, int]) -> Iterator[Balancer]:
    port, control = free_port(), folder / "control"
    servers = "\n".join(f"  server {name} 127.0.0.1:{server_port} check inter 300ms fall 2 rise 1" for name, server_port in ports.items())
    (folder / "haproxy.cfg").write_text(
        f"""global
  stats socket {control} level admin
defaults
  mode http
  timeout connect 2s
  timeout client 120s
  timeout server 120s
  retries 0
frontend public
  bind 127.0.0.1:{port}
  default_backend pictures
backend pictures
  balance leastconn
  option httpchk GET /readyz
  http-check expect status 200
  http-response set-header served-by %s
  stick-table type string len 32 size 10k expire 1h
  stick store-response res.cook(job_server)
  stick match req.cook(job_server)
{servers}
"""
    )
    assert HAPROXY is not None
    with (folder / "haproxy.log").open("w") as log:
        process = subprocess.Popen([HAPROXY, "-db", "-f", str(folder / "haproxy.cfg")], stdout=log, stderr=subprocess.STDOUT)
    try:
        balancer = Balancer(f"http://127.0.0.1:{port}", control)
        deadline = time.monotonic() + TURN_TIMEOUT_S
        while not control.exists():
            assert process.poll() is None, (folder / "haproxy.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield balancer
    finally:
        stop(process)


@dataclass
class Load:
    """Clients that request images one after the other until they are stopped, with a record of every request."""

    url: str
    successes: Counter[str] = field(default_factory=Counter)
    retried: int = 0
    lost: list[str] = field(default_factory=list)
    sent: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _end: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._client, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._end.set()
            for thread in threads:
                thread.join()

    def wait_for(self, more: int) -> None:
        """Wait until `more` further requests have succeeded."""
        goal, deadline = self.successes.total() + more, time.monotonic() + REQUEST_TIMEOUT_S
        while self.successes.total() < goal:
            assert time.monotonic() < deadline, f"only {self.successes.total()} of {goal} responses"
            time.sleep(0.05)

    def _client(self, number: int) -> None:
        # A new connection for each request: a stopping server may close a kept one just as it is used.
        steps = (1, 2, 4, 6, 10, 20)[number % CLIENTS]
        seed = number * 1000
        while not self._end.is_set():
            seed += 1
            with self._lock:
                self.sent += 1
            self._ask({"prompt": "a red circle", "num_inference_steps": steps, "seed": seed, "guidance_scale": 1 + number % 2})

    def _ask(self, request: dict[str, object]) -> None:
        for attempt in range(1, TRIES + 1):
            try:
                response = httpx.post(f"{self.url}/txt2img", json=request, timeout=REQUEST_TIMEOUT_S, **PLAIN_HTTP)
            except httpx.TransportError as reason:
                outcome = f"{type(reason).__name__}: {reason}"
            else:
                outcome = f"{response.status_code}: {response.text[:200]}" if response.status_code != 200 else ""
                if response.status_code == 200:
                    with self._lock:
                        self.successes[response.headers["served-by"]] += 1
                    return
            with self._lock:
                if attempt == TRIES or not outcome.startswith(("502", "503")):
                    self.lost.append(outcome)
                    return
                self.retried += 1
            time.sleep(RETRY_PAUSE_S)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("store")
    build_bento(ROOT / "fp32", home)
    return home


@contextmanager
def from_store(store: Path, port: int) -> Iterator[Server]:
    # One core each: on a small machine two models that both use all cores slow each other down many times.
    changes = {"SD_MODEL": "demo", "BENTOML_CONFIG_OPTIONS": "runners.resources.cpu=1"}
    with serve(store, "stable_diffusion_fp32:latest", store, changes, port) as server:
        yield server


def assert_jobs_are_found_through(balancer: Balancer) -> None:
    """A client that keeps cookies reaches the server of its job, however the balancer distributes other requests."""
    took: set[str] = set()
    for number in range(6):
        with httpx.Client(base_url=balancer.url, timeout=REQUEST_TIMEOUT_S, **PLAIN_HTTP) as client:
            request = {"prompt": "a red circle", "num_inference_steps": 4, "seed": number}
            taken = client.post("/txt2img", json=request, headers={"Prefer": "respond-async"})
            assert taken.status_code == 202
            took.add(taken.headers["served-by"])
            deadline = time.monotonic() + TURN_TIMEOUT_S
            while (asked := client.get(taken.headers["location"])).json().get("state") != "completed":
                assert asked.status_code == 200
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert asked.headers["served-by"] == taken.headers["served-by"]
            assert client.get(asked.json()["picture"]).headers["seed"] == str(number)
    assert took == {"a", "b"}
    # Without the cookie either server may get the request.
    answers = [httpx.get(f"{balancer.url}{taken.headers['location']}", **PLAIN_HTTP).status_code for _ in range(6)]
    assert set(answers) == {200, 404}


def test_no_accepted_request_is_lost_while_servers_die_drain_and_are_replaced(store: Path, tmp_path: Path) -> None:
    ports = {"a": free_port(), "b": free_port()}
    table: list[tuple[str, Load]] = []

    @contextmanager
    def load(phase: str) -> Iterator[Load]:
        clients = Load(balancer.url)
        with clients.running():
            yield clients
        table.append((phase, clients))

    with ExitStack() as running:
        first, second = (running.enter_context(from_store(store, port)) for port in ports.values())
        balancer = running.enter_context(haproxy(tmp_path, ports))

        with load("both serve") as clients:
            clients.wait_for(40)

        assert_jobs_are_found_through(balancer)

        with load("a is killed") as clients:
            clients.wait_for(10)
            kill(first.process)
            balancer.wait_until("a", "status", "DOWN")
            clients.wait_for(20)

        running.enter_context(from_store(store, ports["a"]))
        balancer.wait_until("a", "status", "UP")

        with load("b is drained, stopped and replaced") as clients:
            clients.wait_for(10)
            balancer.order("set server pictures/b state drain")
            balancer.wait_until("b", "scur", "0")
            stop(second.process)
            assert second.process.returncode == 0
            clients.wait_for(10)
            running.enter_context(from_store(store, ports["b"]))
            balancer.order("set server pictures/b state ready")
            balancer.wait_until("b", "status", "UP")
            before = clients.successes["b"]
            while clients.successes["b"] == before:
                clients.wait_for(1)

    print(f"\n{'':<36}{'sent':>6}{'by a':>6}{'by b':>6}{'retried':>9}{'lost':>6}")
    for phase, clients in table:
        print(
            f"{phase:<36}{clients.sent:>6}{clients.successes['a']:>6}{clients.successes['b']:>6}{clients.retried:>9}{len(clients.lost):>6}"
        )
    for phase, clients in table:
        assert clients.lost == [], phase
        assert clients.successes.total() == clients.sent, phase
    both, killed, drained = (clients for _, clients in table)
    assert both.retried == 0
    assert min(both.successes["a"], both.successes["b"]) > 0.25 * both.sent
    assert 0 < killed.retried <= TRIES * CLIENTS
    assert drained.retried == 0
