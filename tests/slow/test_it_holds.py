"""Mixed load with faults, killed processes and a stopped server: every request gets an allowed outcome, and the ledger balances."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests import faults
from tests.http.asking import draw, refused
from tests.http.following import ask, ended, start
from tests.http.ledger import DISTURBED, PROMPT, SOUND_KINDS, Load
from tests.http.servers import PLAIN_HTTP, ROOT, Server, serve

STUCK_STEP_S = 15
# Circus checks for dead processes every ten seconds; then the runner imports torch and loads the model: half a minute on an idle machine.
READY_AGAIN_S = 200


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    variables = {
        "PYTHONPATH": str(ROOT),
        "BENTOML_CONFIG": str(ROOT / "fp32" / "configuration.yaml"),
        "SD_STUCK_STEP_S": str(STUCK_STEP_S),
        # As in a container, where BentoML would not restart dead processes.
        "BENTOML_CONTAINERIZED": "true",
    }
    with serve(ROOT / "tests" / "http" / "faulty", "service:svc", tmp_path_factory.mktemp("faulty"), variables) as started:
        yield started


@pytest.fixture(scope="module")
def load_on(server: Server) -> Callable[[int], Load]:
    first = Load(server.url, 0)
    first.draw_alone()
    return lambda seed: Load(server.url, seed, alone=first.alone)


@contextmanager
def under(load: Load, clients: int, kinds: tuple[str, ...] = ()) -> Iterator[Callable[[Callable[[], bool]], None]]:
    """Run the load on a thread with its own event loop until the block ends. Raises Uneven if a request has no outcome then.

    Gives what waits for something to be true while the load goes on.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        running: Future[None] = thread.submit(lambda: asyncio.run(load.run(clients, lambda: not stop.is_set(), kinds)))

        def wait_until(condition: Callable[[], bool]) -> None:
            seconds_until(lambda: running.done() or condition())
            if running.done():
                running.result()

        try:
            yield wait_until
        finally:
            stop.set()
        running.result()


def workers(server: Server, what: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a killed process
            if what in " ".join(process.cmdline()):
                found.append(process)
    return found


def is_ready(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/readyz", timeout=10, **PLAIN_HTTP).status_code == 200
    except httpx.TransportError:
        return False


def seconds_until(condition: Callable[[], bool], at_most_s: float = READY_AGAIN_S) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < at_most_s
        time.sleep(0.1)
    return time.monotonic() - began


def sums(server: Server) -> dict[str, float]:
    """Of our metrics, over all labels."""
    page = httpx.get(f"{server.url}/metrics", **PLAIN_HTTP).text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def require_nothing_left(server: Server) -> None:
    seconds_until(lambda: sums(server)["stable_diffusion_queue_jobs"] + sums(server)["stable_diffusion_running_jobs"] == 0, 60)
    assert sums(server)["stable_diffusion_workload_seconds"] == pytest.approx(0, abs=0.01)


def require_undisturbed(load: Load, began_after_s: float) -> None:
    assert {entry.answered for entry in load.entries if entry.began_s > began_after_s} <= {"picture"}


def held_by(worker: psutil.Process, server: Server) -> list[object]:
    """The client connections that an API worker has open."""
    _, port = server.address
    return [one for one in worker.net_connections("tcp") if one.raddr and one.laddr.port == port]


def test_hundreds_of_requests_with_random_faults_all_get_an_allowed_outcome(server: Server, load_on: Callable[[int], Load]) -> None:
    load = load_on(1)
    before = sums(server)
    with under(load, clients=12) as wait_until:
        wait_until(lambda: len(load.entries) >= 300)
    print(load.summary())
    require_nothing_left(server)
    after = sums(server)
    drawn = sum(entry.answered == "picture" for entry in load.entries)
    assert after["stable_diffusion_images_total"] - before["stable_diffusion_images_total"] >= drawn > 50
    assert {"deadline_exceeded", "dropped"} <= {entry.answered for entry in load.entries}
    assert after["stable_diffusion_decoded_again_total"] > before["stable_diffusion_decoded_again_total"]
    assert len({entry.asked for entry in load.entries}) == 11


def test_a_hanging_step_becomes_an_error_within_seconds_and_the_model_process_restarts(
    server: Server, load_on: Callable[[int], Load]
) -> None:
    load = load_on(2)
    load.allowed_besides = DISTURBED
    with under(load, clients=3, kinds=SOUND_KINDS), server.client() as client:
        began = time.monotonic()
        hung = client.post("/txt2img", json={"prompt": f"{PROMPT} {faults.HANGS}", "num_inference_steps": 5, "seed": 2})
        told = time.monotonic() - began
        assert (hung.status_code, hung.json()["error"]["type"]) == (503, "model_unavailable")
        assert not is_ready(server)
        ready = seconds_until(lambda: is_ready(server))
        recovered = time.monotonic()
        assert client.post("/txt2img", json={"prompt": PROMPT, "num_inference_steps": 2}).status_code == 200
    require_undisturbed(load, began_after_s=recovered)
    print(f"a step that hangs: told after {told:.1f} s, ready again after {ready:.1f} s more; {load.summary()}")
    assert told < STUCK_STEP_S + 20
    require_nothing_left(server)


def test_killing_the_runner_under_load_loses_only_running_jobs(server: Server, load_on: Callable[[int], Load]) -> None:
    """This includes asynchronous jobs: they fail, and their idempotency keys may be used again."""
    load = load_on(3)
    attended = f"/jobs/{draw(server, num_inference_steps=1).headers['job-id']}"
    # A client gets its image before the store notes it; what the store has not noted dies with the process.
    assert ended(server, attended)["state"] == "completed"
    long = {"num_inference_steps": 150, "height": 128, "width": 128}
    load.allowed_besides = DISTURBED - {"broken connection", "refused connection"}
    with under(load, clients=6, kinds=SOUND_KINDS) as wait_until:
        wait_until(lambda: len(load.entries) >= 10)
        asynchronous = start(server, "a key", **long).headers["location"]
        [runner] = workers(server, "bentoml_cli.worker.runner")
        runner.kill()
        gone = seconds_until(lambda: not is_ready(server), 30)
        known = time.monotonic()
        ready = seconds_until(lambda: is_ready(server))
        recovered = time.monotonic()
        assert ended(server, asynchronous)["state"] == "failed"
        assert "model process" in refused(ask(server, f"{asynchronous}/picture"), 503)
        assert ask(server, attended).json()["state"] == "completed", "stored states outlive the process"
        again = start(server, "a key", **long).headers["location"]
        assert again != asynchronous
        assert ask(server, again, "DELETE").status_code == 200
        drawn = len(load.entries)
        wait_until(lambda: sum(entry.answered == "picture" for entry in load.entries[drawn:]) >= 10)
    print(f"a runner that is killed: not ready after {gone:.1f} s, ready again after {ready:.1f} s more; {load.summary()}")
    lost = [entry for entry in load.entries if entry.answered == "model_unavailable"]
    assert all(entry.began_s < known for entry in lost), "from then on it is known that nothing can be drawn"
    require_undisturbed(load, began_after_s=recovered)
    require_nothing_left(server)


def test_killing_an_api_worker_under_load_breaks_only_its_connections(server: Server, load_on: Callable[[int], Load]) -> None:
    load = load_on(4)
    load.allowed_besides = {"broken connection"}
    with under(load, clients=6, kinds=SOUND_KINDS) as wait_until:
        wait_until(lambda: len(load.entries) >= 10)
        victim, other = sorted(workers(server, "bentoml_cli.worker.http_api_server"), key=lambda worker: len(held_by(worker, server)))
        victim.suspend()  # so that it accepts no more connections while they are counted
        held, held_by_other = len(held_by(victim, server)), len(held_by(other, server))
        victim.kill()
        again = seconds_until(lambda: len(workers(server, "http_api_server")) == 2)
        drawn = len(load.entries)
        wait_until(lambda: len(load.entries) >= drawn + 20)
    broken = sum(entry.answered == "broken connection" for entry in load.entries)
    print(f"an API worker that is killed: another one after {again:.1f} s; it held {held} connections, the other {held_by_other}")
    print(load.summary())
    assert broken <= held
    require_nothing_left(server)


def test_a_server_stopped_under_load_finishes_accepted_requests_and_exits_with_0(server: Server, load_on: Callable[[int], Load]) -> None:
    load = load_on(5)
    # The model process may stop a moment before an API worker, which then cannot reach it.
    load.allowed_besides = {"shutting_down", "model_unavailable", "refused connection", "broken connection"}
    accepted_s = began = ended_after_s = 0.0
    with under(load, clients=6, kinds=SOUND_KINDS) as wait_until:
        wait_until(lambda: len(load.entries) >= 10)
        accepted_s = time.monotonic()
        time.sleep(0.5)  # a request reaches the model process within milliseconds
        began = time.monotonic()
        server.process.terminate()
        assert server.process.wait(120) == 0
        ended_after_s = time.monotonic() - began
    accepted = [entry for entry in load.entries if entry.began_s < accepted_s]
    assert {entry.answered for entry in accepted} == {"picture"}
    # A connection at the very end, when the server no longer accepts any, is never read.
    assert all(entry.began_s > began for entry in load.entries if entry.answered == "broken connection")
    unfinished = sum(entry.began_s + entry.seconds > began for entry in accepted)
    print(f"a server that is stopped: ended after {ended_after_s:.1f} s, with {unfinished} that it had accepted; {load.summary()}")
