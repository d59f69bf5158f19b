"""What machines share in a real Redis or Valkey, and what happens while it is killed, cut off, slow or full."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from stable_diffusion.core.errors import (
    DeadlineExceeded,
    GenerationFailed,
    PictureExpired,
    SettingError,
    SharedStateUnavailable,
    TooManyJobs,
)
from stable_diffusion.core.settings import read_settings
from stable_diffusion.core.types import Progress, Task, Ticket
from stable_diffusion.state.jobs import MAX_ASYNCHRONOUS_JOBS, WaitingWork
from stable_diffusion.state.shared_state import check_shared_state, open_state
from stable_diffusion.state.sqlite_rates import SqliteRateLimit
from tests.http.servers import ROOT, free_port
from tests.redis_server import RedisServer, let_pass, needs_redis_server, started, way_to
from tests.tasks import make_task
from tests.unit.state.test_jobs import ASYNCHRONOUS, PICTURE, TICKET

if TYPE_CHECKING:
    from stable_diffusion.state.redis_jobs import RedisJobs
    from stable_diffusion.state.shared_store import SharedStore

LONGEST_CALL_S = 5
PASSWORD = "correct-horse-battery-staple"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with started(tmp_path) as server:
        yield server


@contextmanager
def store_at(url: str) -> Iterator[SharedStore]:
    from stable_diffusion.state.shared_store import SharedStore

    address = read_settings({"SD_SHARED_STATE": url}).shared_state
    assert address is not None
    store = SharedStore(address)
    yield store
    store.close()


@pytest.fixture
def machines(server: RedisServer) -> Iterator[Callable[..., RedisJobs]]:
    """Makes machines that share the server, each with a connection of its own."""
    from stable_diffusion.state.redis_jobs import RedisJobs

    with ExitStack() as opened:

        def machine(name: str, url: str = server.url, **changes: int) -> RedisJobs:
            jobs = RedisJobs(opened.enter_context(store_at(url)), name, **changes)
            opened.callback(jobs.close)
            return jobs

        yield machine


def seconds_of(call: Callable[[], object]) -> float:
    """How long a call takes that finds the shared state unavailable."""
    began_s = time.monotonic()
    with pytest.raises(SharedStateUnavailable):
        call()
    return time.monotonic() - began_s


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- settings ---------------------------------------------------------------------------------------


def refusal(url: str) -> str:
    began_s = time.monotonic()
    with pytest.raises(SettingError) as refused:
        check_shared_state({"SD_SHARED_STATE": url})
    assert time.monotonic() - began_s < LONGEST_CALL_S
    assert PASSWORD not in str(refused.value)
    return str(refused.value)


def test_without_the_setting_nothing_is_shared_and_the_client_is_not_imported() -> None:
    script = (
        "import os, sys, warnings; warnings.simplefilter('ignore')\n"
        "from stable_diffusion.state.shared_state import check_shared_state, open_state\n"
        "check_shared_state({}); state = open_state({}); state.rate_limit(1)\n"
        "import stable_diffusion.server.service, stable_diffusion.runner.startup\n"
        "print(type(state.jobs).__name__, state.is_reachable, 'redis' in sys.modules)"
    )
    environment = {**os.environ, "SD_SHARED_FOLDER": "/nowhere"}
    shown = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "SqliteJobs None False"


@needs_redis_server
def test_a_store_that_answers_is_accepted(server: RedisServer) -> None:
    check_shared_state({"SD_SHARED_STATE": server.url})
    check_shared_state({"SD_SHARED_STATE": server.url.replace("127.0.0.1", "localhost")})


@needs_redis_server
def test_a_wrong_password_is_refused_and_appears_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with started(tmp_path, "--requirepass", f"{PASSWORD}!") as server:
        check_shared_state({"SD_SHARED_STATE": server.url.replace("//", f"//:{PASSWORD}%21@")})
        where = f"127.0.0.1:{server.port}"
        for credentials in (f":{PASSWORD}@", f"alice:{PASSWORD}@", ""):
            message = refusal(server.url.replace("//", f"//{credentials}"))
            assert message == f"SD_SHARED_STATE: the store at {where} does not accept the user or the password"
        with store_at(server.url.replace("//", f"//:{PASSWORD}@")) as store:
            seconds_of(lambda: store.run("return 1", []))
            assert not store.is_reachable()
    assert PASSWORD not in caplog.text
    assert PASSWORD not in repr(read_settings({"SD_SHARED_STATE": f"redis://:{PASSWORD}@localhost"}))


def test_a_store_that_does_not_listen_is_refused() -> None:
    port = free_port()
    assert refusal(f"redis://:{PASSWORD}@127.0.0.1:{port}") == f"SD_SHARED_STATE: the store at 127.0.0.1:{port} cannot be reached"


def test_a_program_that_says_nothing_or_something_else_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert refusal(f"redis://127.0.0.1:{silent.getsockname()[1]}").endswith("does not answer")
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert refusal(f"redis://127.0.0.1:{other.getsockname()[1]}").endswith("does not speak the protocol of Redis")
        thread.join()


def test_a_machine_that_drops_what_is_sent_to_it_is_refused() -> None:
    # With its queue full, the kernel answers no further connection: as behind a firewall that drops packets.
    with ExitStack() as opened:
        full = opened.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(2):
            waiting = opened.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        assert refusal(f"redis://127.0.0.1:{full.getsockname()[1]}").endswith("does not answer")


@needs_redis_server
def test_an_encrypted_store_is_used_if_its_certificate_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    tls_port = free_port()
    options = ["--tls-port", str(tls_port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-auth-clients", "no"]
    with started(tmp_path, *options, "--tls-ca-cert-file", str(certificate)):
        url = f"rediss://127.0.0.1:{tls_port}"
        assert refusal(url).endswith("has no TLS certificate that this machine trusts")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        check_shared_state({"SD_SHARED_STATE": url})


# --- several machines -------------------------------------------------------------------------------


@needs_redis_server
def test_what_one_machine_has_accepted_another_finds_cancels_and_counts(machines: Callable[..., RedisJobs]) -> None:
    first, second = machines("first"), machines("second")
    first.accept(ASYNCHRONOUS, [make_task()], "key", "print", "webp")
    assert second.accept(replace(ASYNCHRONOUS, job_id="b2"), [make_task()], "key", "print") == "a1"
    assert (second.get("a1")[0].state, second.get("a1")[0].image_format) == ("queued", "webp")
    first.begin(ASYNCHRONOUS, make_task(), 0)
    first.note({ASYNCHRONOUS: Progress(0, 3, 8, 2.5)})
    assert [record.progress.step for record in second.of_owner("somebody")] == [3]
    second.cancel_of_owner("somebody")
    assert second.to_cancel(0) == [], "the runner of this number on another machine"
    assert first.to_cancel(0) == [("a1", 0)]
    first.end(ASYNCHRONOUS, PICTURE)
    assert second.get("a1")[0].finished() == PICTURE
    assert second.of_owner("somebody") == []


@needs_redis_server
def test_a_cancellation_before_a_runner_has_the_job_reaches_it(machines: Callable[..., RedisJobs]) -> None:
    first, second = machines("first"), machines("second")
    tickets = [replace(ASYNCHRONOUS, job_id=job_id) for job_id in ("a1", "b2")]
    for ticket in tickets:
        first.accept(ticket, [make_task()], None, "print")
    second.cancel("a1")
    second.abandon("b2", SharedStateUnavailable("gone"))
    for ticket in tickets:
        first.begin(ticket, make_task(), 0)
    assert sorted(first.to_cancel(0)) == [("a1", 0), ("b2", 0)]


@needs_redis_server
def test_the_jobs_of_a_machine_that_fell_silent_go_to_others_and_what_it_says_later_is_refused(
    machines: Callable[..., RedisJobs], server: RedisServer
) -> None:
    first, second = machines("first"), machines("second")
    first.accept(ASYNCHRONOUS, [make_task(seed=7)], "key", "print")
    first.begin(replace(TICKET, job_id="waited for"), make_task(), 0)
    (own,) = image_of(first)
    first.begin(own[1], own[0], 0)
    first.note({own[1]: Progress(0, 3, 8, 2.5, PICTURE.image)})
    second.to_cancel(0)
    let_pass(server, 29)
    second.to_cancel(0)
    assert second.get("a1")[0].state == "running"
    let_pass(server, 2)
    (record,) = second.get("a1")
    assert (record.state, record.progress.step, record.preview_png, record.is_estimated) == ("queued", 0, None, False)
    assert second.get("waited for")[0].state == "failed", "its client got a broken connection"
    assert second.accept(replace(ASYNCHRONOUS, job_id="b2"), [make_task()], "key", "print") == "a1"
    ((task, ticket),) = image_of(second)
    assert (task, ticket.attempt, ticket.owner, ticket.asynchronous) == (own[0], 1, "somebody", True)
    second.begin(ticket, task, 0)
    # It was only slow, and comes too late.
    first.note({own[1]: Progress(0, 8, 8, 0.1)})
    first.end(own[1], GenerationFailed("stopped"))
    first.abandon("a1", GenerationFailed("stopped"), own[1].attempt)
    first.give_back(own[1], is_redraw=True)
    first.begin(own[1], own[0], 0)
    assert ("a1", 0) in first.to_cancel(0)
    assert second.to_cancel(0) == []
    assert (second.get("a1")[0].state, second.get("a1")[0].progress.step) == ("queued", 0)
    second.end(ticket, PICTURE)
    first.end(own[1], PICTURE)
    assert first.get("a1")[0].finished() == PICTURE
    assert first.take(9) is None


def image_of(machine: RedisJobs) -> tuple[tuple[Task, Ticket], ...]:
    """The images of the job that the machine takes next."""
    taken = machine.take(9)
    assert taken is not None
    return taken.images


@needs_redis_server
def test_a_job_that_ends_its_process_three_times_fails(machines: Callable[..., RedisJobs], server: RedisServer) -> None:
    jobs = machines("machine")
    jobs.accept(ASYNCHRONOUS, [make_task()], None, "print")
    for attempt in range(3):
        ((task, ticket),) = image_of(jobs)
        assert ticket.attempt == attempt
        jobs.begin(ticket, task, 0)
        if attempt == 1:
            jobs.register_runner(0)  # started again
        else:
            jobs.give_back(ticket, is_redraw=True)
            jobs.give_back(ticket, is_redraw=True)
    assert jobs.take(9) is None
    (record,) = jobs.get("a1")
    assert record.state == "failed"
    with pytest.raises(GenerationFailed, match="the model process stopped"):
        record.finished()
    nothing_waits(server)


def nothing_waits(server: RedisServer) -> None:
    """Nothing is left in the queue, of inputs, or in the hands of machines and runners."""
    with server.client() as client:
        left = {key.decode().removeprefix("stable_diffusion:{jobs}:").partition(":")[0] for key in client.keys("*")}
        assert left & {"queue", "callers", "waiting_until", "unclaimed", "machine", "input", "runner", "owner", "asynchronous"} == set()
        assert int(client.get("stable_diffusion:{jobs}:input_bytes") or 0) == 0


@needs_redis_server
def test_a_job_that_a_machine_cannot_generate_now_goes_back_as_often_as_needed(machines: Callable[..., RedisJobs]) -> None:
    first, second = machines("first"), machines("second")
    first.accept(ASYNCHRONOUS, [make_task()], None, "print")
    for attempt in range(6):
        ((_, ticket),) = image_of(first)
        assert ticket.attempt == attempt
        first.give_back(ticket, is_redraw=False)
    assert image_of(second)[0][1].attempt == 6


@needs_redis_server
def test_a_job_whose_worker_died_before_a_runner_got_it_goes_to_another_machine(
    machines: Callable[..., RedisJobs], server: RedisServer
) -> None:
    first, second = machines("first"), machines("second")
    first.accept(ASYNCHRONOUS, [make_task()], None, "print")
    image_of(first)
    let_pass(server, 58)
    assert second.take(9) is None
    first.note_held("a1")
    let_pass(server, 58)
    assert second.take(9) is None, "its worker still waits for a runner that loads"
    let_pass(server, 3)
    assert image_of(second)[0][1].attempt == 1


@needs_redis_server
def test_a_machine_takes_no_more_images_than_it_has_room_for(machines: Callable[..., RedisJobs], server: RedisServer) -> None:
    first, second = machines("first"), machines("second")
    for number in range(4):
        first.accept(Ticket(f"job {number}", "somebody", asynchronous=True), [make_task(seed=number)], None, "print")
    first.begin(TICKET, make_task(), 0)  # somebody waits for it
    ((task, ticket),) = image_of(first)
    assert (task.seed, first.take(2)) == (0, None)
    first.begin(ticket, task, 0)
    assert first.take(2) is None
    assert image_of(second)[0][0].seed == 1
    first.end(ticket, PICTURE)
    ((task, _),) = image_of(first)
    assert (task.seed, first.take(2)) == (2, None)


@needs_redis_server
def test_callers_take_turns_by_their_work(machines: Callable[..., RedisJobs]) -> None:
    jobs = machines("machine")
    many = [Ticket(f"many {number}", "many", asynchronous=True) for number in range(6)]
    for ticket in many:
        jobs.accept(ticket, [make_task(num_inference_steps=10)], None, "print")
    taken = [image_of(jobs)[0][1].job_id for _ in range(2)]
    jobs.accept(Ticket("one", "one", asynchronous=True), [make_task(num_inference_steps=20)], None, "print")
    jobs.accept(Ticket("one more", "one", asynchronous=True), [make_task(num_inference_steps=20)], None, "print")
    taken += [image_of(jobs)[0][1].job_id for _ in range(6)]
    # Its first job took twice as much as those of the other.
    assert taken == ["many 0", "many 1", "one", "many 2", "many 3", "one more", "many 4", "many 5"]


@needs_redis_server
def test_the_inputs_of_a_job_reach_the_machine_that_takes_it_bit_for_bit_and_go_with_its_end(
    machines: Callable[..., RedisJobs], server: RedisServer, input_picture: Image.Image, right_half_mask: Image.Image
) -> None:
    first, second = machines("first"), machines("second")
    tasks = [
        make_task(kind="inpaint", image=input_picture, mask=right_half_mask, strength=0.5, seed=seed, image_hash="abc") for seed in (1, 2)
    ]
    first.accept(ASYNCHRONOUS, tasks, None, "print", "png")
    images = image_of(second)
    assert [(task, ticket.index) for task, ticket in images] == list(zip(tasks, (0, 1), strict=True))
    for task, ticket in images:
        second.begin(ticket, task, 0)
        second.end(ticket, PICTURE)
    nothing_waits(server)


@needs_redis_server
def test_inputs_that_do_not_fit_are_refused(
    machines: Callable[..., RedisJobs], monkeypatch: pytest.MonkeyPatch, server: RedisServer
) -> None:
    from stable_diffusion.state import redis_scripts

    monkeypatch.setattr(redis_scripts, "ACCEPT", redis_scripts.ACCEPT.replace(str(redis_scripts.INPUT_BYTES), "100"))
    with pytest.raises(TooManyJobs, match="256 MiB"):
        machines("machine").accept(ASYNCHRONOUS, [make_task(image=PICTURE.image)], "key", "print")
    nothing_waits(server)


@needs_redis_server
def test_a_job_that_waits_is_cancelled_or_too_late_at_once(machines: Callable[..., RedisJobs], server: RedisServer) -> None:
    jobs = machines("machine")
    jobs.accept(ASYNCHRONOUS, [make_task(), make_task(seed=2)], None, "print")
    jobs.cancel("a1")
    assert [record.state for record in jobs.get("a1")] == ["cancelled"] * 2
    jobs.accept(replace(ASYNCHRONOUS, job_id="b2"), [make_task()], None, "print")
    jobs.cancel_of_owner("somebody")
    assert jobs.get("b2")[0].state == "cancelled"
    jobs.accept(replace(ASYNCHRONOUS, job_id="c3", timeout_s=30.0), [make_task()], None, "print")
    let_pass(server, 20)
    assert jobs.get("c3")[0].state == "queued"
    let_pass(server, 11)
    with pytest.raises(DeadlineExceeded):
        jobs.get("c3")[0].finished()
    assert jobs.take(9) is None
    nothing_waits(server)


@needs_redis_server
def test_the_time_that_a_job_has_goes_on_while_it_waits(machines: Callable[..., RedisJobs], server: RedisServer) -> None:
    jobs = machines("machine")
    jobs.accept(replace(ASYNCHRONOUS, timeout_s=30.0), [make_task()], None, "print")
    let_pass(server, 20)
    assert 5 < image_of(jobs)[0][1].timeout_s <= 10


@needs_redis_server
def test_a_cancellation_between_two_machines_is_not_forgotten(machines: Callable[..., RedisJobs], server: RedisServer) -> None:
    jobs = machines("machine")
    jobs.accept(ASYNCHRONOUS, [make_task()], None, "print")
    ((task, ticket),) = image_of(jobs)
    jobs.begin(ticket, task, 0)
    jobs.cancel("a1")
    jobs.give_back(ticket, is_redraw=True)
    assert jobs.get("a1")[0].state == "cancelled"
    nothing_waits(server)


@needs_redis_server
def test_the_work_that_waits_is_that_of_the_jobs_that_no_machine_has(machines: Callable[..., RedisJobs], server: RedisServer) -> None:
    first, second = machines("first"), machines("second")
    assert first.waiting_work() == WaitingWork(0, 0)
    for jobs, runner in ((first, 0), (first, 1), (second, 0)):
        jobs.register_runner(runner)
    one = 64 * 64 * 8
    first.accept(ASYNCHRONOUS, [make_task()], None, "print")
    first.accept(Ticket("b2", "the next", asynchronous=True), [make_task(seed=seed) for seed in range(3)], None, "print")
    assert first.waiting_work() == second.waiting_work() == WaitingWork(4 * one, 3)
    ((task, ticket),) = image_of(second)
    second.begin(ticket, task, 0)
    assert first.waiting_work() == WaitingWork(3 * one, 3)
    second.give_back(ticket, is_redraw=False)
    assert first.waiting_work() == WaitingWork(4 * one, 3)
    first.cancel("b2")
    assert first.waiting_work() == WaitingWork(one, 3)
    let_pass(server, 31)  # they are silent, and nobody has looked yet
    assert first.waiting_work() == WaitingWork(one, 0)


@needs_redis_server
def test_one_of_many_machines_takes_a_job(machines: Callable[..., RedisJobs]) -> None:
    several = [machines(f"machine {number}") for number in range(4)]
    for number in range(40):
        several[0].accept(Ticket(f"job {number}", "somebody", asynchronous=True), [make_task()], None, "print")
    taken: list[str] = []

    def take(jobs: RedisJobs) -> None:
        while (one := jobs.take(100)) is not None:
            taken.append(one.job_id)

    threads = [threading.Thread(target=take, args=(jobs,)) for jobs in several]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(f"job {number}" for number in range(40))


@needs_redis_server
def test_when_a_replica_has_taken_over_at_most_one_call_fails_and_the_next_reaches_it(
    machines: Callable[..., RedisJobs], server: RedisServer, tmp_path: Path
) -> None:
    folder = tmp_path / "replica"
    folder.mkdir()
    with started(folder, "--replicaof", f"127.0.0.1 {server.port}") as replica, way_to(server) as way:
        jobs = machines("machine", way.url)
        jobs.accept(ASYNCHRONOUS, [make_task()], None, "print")
        with server.client() as old, replica.client() as new:
            old.config_set("repl-diskless-sync-delay", 0)
            until(lambda: new.dbsize() == old.dbsize())  # else the job would be lost
            new.replicaof("NO", "ONE")
            old.replicaof("127.0.0.1", replica.port)
            way.target = replica.port  # as the name of ElastiCache's primary
            # A store that loads everything anew closes its connections itself, and then no call fails.
            with suppress(SharedStateUnavailable):
                jobs.note_held("a1")
            ((_, ticket),) = image_of(jobs)
            assert ticket.job_id == "a1"


@needs_redis_server
def test_after_the_store_was_away_machines_have_time_to_report_again(machines: Callable[..., RedisJobs], server: RedisServer) -> None:
    jobs = machines("machine")
    jobs.begin(TICKET, make_task(), 0)
    with server.client() as client:
        (watch,) = client.keys("*:watch") or [b"stable_diffusion:{jobs}:watch"]
        client.hset(watch, mapping={"since_at": 1, "last_at": 2})  # nobody has looked for long
        (runners,) = client.keys("*:runners")
        client.zincrby(runners, -1000, client.zrange(runners, 0, 0)[0])
    assert jobs.get("a1")[0].state == "queued"
    jobs.to_cancel(0)
    let_pass(server, 29)
    assert jobs.get("a1")[0].state == "queued"
    let_pass(server, 2)
    assert jobs.get("a1")[0].state == "failed"


@needs_redis_server
def test_a_runner_reports_while_it_has_nothing_to_do(machines: Callable[..., RedisJobs], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stable_diffusion.state.redis_jobs._REPORT_S", 0.05)
    jobs = machines("machine")
    told: list[int] = []
    monkeypatch.setattr(jobs, "to_cancel", told.append)
    jobs.register_runner(3)
    until(lambda: len(told) > 2)
    assert set(told) == {3}


@needs_redis_server
def test_each_runner_adds_places_for_jobs_that_nobody_waits_for(machines: Callable[..., RedisJobs]) -> None:
    first, second = machines("first"), machines("second")
    first.register_runner(0)
    second.register_runner(0)
    for number in range(2 * MAX_ASYNCHRONOUS_JOBS):
        (first, second)[number % 2].accept(Ticket(f"job {number}", "somebody", asynchronous=True), [make_task()], None, "")
    with pytest.raises(TooManyJobs, match="128 jobs"):
        first.accept(ASYNCHRONOUS, [make_task()], None, "")


@needs_redis_server
def test_the_last_images_are_kept_up_to_a_number_of_bytes(machines: Callable[..., RedisJobs], server: RedisServer) -> None:
    from stable_diffusion.state.job_record import as_png

    size = len(as_png(PICTURE.image))
    jobs = machines("machine", kept_bytes=3 * size)
    for number in range(5):
        ticket = replace(ASYNCHRONOUS, job_id=f"job {number}")
        jobs.begin(ticket, make_task(), 0)
        jobs.end(ticket, PICTURE)
    for number in range(2):
        with pytest.raises(PictureExpired):
            jobs.get(f"job {number}")[0].finished()
    assert all(jobs.get(f"job {number}")[0].finished() == PICTURE for number in range(2, 5))
    with server.client() as client:
        assert len(client.keys("*:picture:*")) == 3
        assert int(client.get("stable_diffusion:{jobs}:picture_bytes")) == 3 * size
        let_pass(server, 3601)
        jobs.begin(ASYNCHRONOUS, make_task(), 0)
        jobs.end(ASYNCHRONOUS, PICTURE)
        assert len(client.keys("*:picture:*")) == 1
        assert int(client.get("stable_diffusion:{jobs}:picture_bytes")) == size


@needs_redis_server
def test_who_asked_for_a_job_is_known_to_each_machine_that_takes_it_and_forgotten_at_its_end(
    machines: Callable[..., RedisJobs], server: RedisServer
) -> None:
    first, second = machines("first"), machines("second")
    first.accept(replace(ASYNCHRONOUS, key_name="laptop \u732b", client_address="2001:db8::1"), [make_task()], None, "print")
    for machine in (second, first):
        ((task, ticket),) = image_of(machine)
        assert (ticket.key_name, ticket.client_address) == ("laptop \u732b", "2001:db8::1")
        machine.begin(ticket, task, 0)
        if machine is second:
            machine.give_back(ticket, is_redraw=True)
    first.end(ticket, PICTURE)
    with server.client() as client:
        assert not {b"key_name", b"client_address"} & client.hgetall("stable_diffusion:{jobs}:job:a1").keys()
    first.accept(replace(ASYNCHRONOUS, job_id="b2"), [make_task()], None, "print")
    ((_, ticket),) = image_of(second)
    assert (ticket.key_name, ticket.client_address) == (None, None), "of a server without keys, on a Unix socket"


@needs_redis_server
def test_what_has_ended_leaves_nothing_that_never_expires(machines: Callable[..., RedisJobs], server: RedisServer) -> None:
    jobs = machines("machine")
    jobs.accept(ASYNCHRONOUS, [make_task()], "key", "print")
    jobs.begin(ASYNCHRONOUS, make_task(), 0)
    jobs.cancel("a1")
    jobs.end(ASYNCHRONOUS, PICTURE)
    jobs.begin(replace(TICKET, job_id="b2"), make_task(), 0)
    jobs.end(replace(TICKET, job_id="b2"), PICTURE)
    with server.client() as client:
        prefix = "stable_diffusion:{jobs}:"
        for_ever = {key.decode().removeprefix(prefix) for key in client.keys("*") if client.ttl(key) < 0}
    assert for_ever == {"input_bytes", "ended", "pictures", "picture_bytes", "runners", "watch"}


@needs_redis_server
def test_all_keys_of_a_script_have_one_hash_tag(machines: Callable[..., RedisJobs], server: RedisServer) -> None:
    jobs = machines("machine")
    jobs.accept(ASYNCHRONOUS, [make_task()], "key", "print")
    jobs.begin(ASYNCHRONOUS, make_task(), 0)
    with server.client() as client:
        assert {key.partition(b"{")[2].partition(b"}")[0] for key in client.keys("*")} == {b"jobs"}


@needs_redis_server
def test_machines_count_the_requests_of_a_caller_together(server: RedisServer, tmp_path: Path) -> None:
    from stable_diffusion.state.redis_rates import RedisRateLimit

    let_in: list[float] = []
    with store_at(server.url) as first, store_at(server.url) as second:
        limits = [RedisRateLimit(store, 30, SqliteRateLimit(lambda: tmp_path, 30)) for store in (first, second)]
        began_s = time.monotonic()
        threads = [threading.Thread(target=lambda limit=limit: let_in.extend(limit.wait_s("alice") for _ in range(40))) for limit in limits]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert 30 <= let_in.count(0.0) <= 30 + (time.monotonic() - began_s) / 2


# --- the store is away, slow or full ----------------------------------------------------------------


@needs_redis_server
def test_a_store_that_is_killed_is_missed_at_once_and_has_everything_when_it_is_back(
    machines: Callable[..., RedisJobs], server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="stable_diffusion")
    jobs = machines("machine")
    jobs.accept(ASYNCHRONOUS, [make_task()], "key", "print")
    jobs.begin(ASYNCHRONOUS, make_task(), 0)
    jobs.end(ASYNCHRONOUS, PICTURE)
    server.kill()
    assert max(seconds_of(lambda: jobs.get("a1")) for _ in range(20)) < 1
    assert seconds_of(lambda: jobs.accept(replace(ASYNCHRONOUS, job_id="b2"), [make_task()], None, "")) < 1
    assert caplog.text.count("The shared state is away: it cannot be reached") == 1
    server.start()
    until(lambda: jobs._store.is_reachable())
    assert jobs.get("a1")[0].finished() == PICTURE
    assert jobs.accept(replace(ASYNCHRONOUS, job_id="b2"), [make_task()], "key", "print") == "a1"
    assert caplog.text.count("The shared state is back") == 1


@needs_redis_server
def test_a_store_whose_port_is_blocked_holds_no_call_for_long_and_comes_back(
    machines: Callable[..., RedisJobs], server: RedisServer, tmp_path: Path
) -> None:
    from stable_diffusion.state.redis_rates import RedisRateLimit

    with way_to(server) as way:
        jobs = machines("machine", way.url)
        limit = RedisRateLimit(jobs._store, 2, SqliteRateLimit(lambda: tmp_path, 2))
        jobs.begin(TICKET, make_task(), 0)
        way.is_blocked = True
        took_s: list[float] = []
        threads = [threading.Thread(target=lambda: took_s.append(seconds_of(lambda: jobs.get("a1")))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert max(took_s) < LONGEST_CALL_S
        assert seconds_of(lambda: jobs.get("a1")) < 0.2, "it is known to be away"
        assert [limit.wait_s("alice") for _ in range(3)][:2] == [0.0, 0.0]
        assert limit.wait_s("alice") > 0, "this machine's own limit"
        way.is_blocked = False
        until(lambda: jobs._store.is_reachable())
        assert jobs.get("a1")[0].state == "queued"


@needs_redis_server
def test_a_slow_store_is_used(machines: Callable[..., RedisJobs], server: RedisServer) -> None:
    with way_to(server) as way:
        way.delay_s = 0.1
        jobs = machines("machine", way.url)
        jobs.accept(ASYNCHRONOUS, [make_task()], "key", "print")
        jobs.begin(ASYNCHRONOUS, make_task(), 0)
        began_s = time.monotonic()
        jobs.end(ASYNCHRONOUS, PICTURE)
        assert 0.1 <= time.monotonic() - began_s < 2
        assert jobs.get("a1")[0].finished() == PICTURE


@needs_redis_server
def test_a_full_store_accepts_nothing_but_still_answers_cancels_and_ends(
    machines: Callable[..., RedisJobs], server: RedisServer, tmp_path: Path
) -> None:
    from stable_diffusion.state.redis_rates import RedisRateLimit

    jobs = machines("machine")
    second = replace(ASYNCHRONOUS, job_id="b2")
    for ticket in (ASYNCHRONOUS, second):
        jobs.accept(ticket, [make_task()], None, "")
        jobs.begin(ticket, make_task(), 0)
    with server.client() as client:
        client.config_set("maxmemory", 1)
        with pytest.raises(SharedStateUnavailable, match="is full"):
            jobs.accept(replace(ASYNCHRONOUS, job_id="c3"), [make_task()], None, "")
        with pytest.raises(SharedStateUnavailable, match="is full"):
            jobs.end(ASYNCHRONOUS, PICTURE)
        assert RedisRateLimit(jobs._store, 1, SqliteRateLimit(lambda: tmp_path, 1)).wait_s("alice") == 0
        assert jobs._store.is_reachable()
        jobs.cancel("b2")
        assert jobs.to_cancel(0) == [("b2", 0)]
        jobs.end(second, SharedStateUnavailable("no room"))
        assert (jobs.get("a1")[0].state, jobs.get("b2")[0].state) == ("queued", "failed")
        client.config_set("maxmemory", 0)
    jobs.end(ASYNCHRONOUS, PICTURE)
    assert jobs.get("a1")[0].finished() == PICTURE


@needs_redis_server
def test_a_store_that_may_delete_unfinished_jobs_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with started(tmp_path, "--maxmemory-policy", "allkeys-lru") as server:
        check_shared_state({"SD_SHARED_STATE": server.url})
    assert "set its maxmemory-policy to noeviction" in caplog.text


@needs_redis_server
def test_the_setting_chooses_the_store(server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_SHARED_FOLDER", str(tmp_path / "shared"))
    state = open_state({"SD_SHARED_STATE": server.url})
    assert state.is_reachable is not None
    assert state.is_reachable()
    state.jobs.accept(ASYNCHRONOUS, [make_task()], None, "")
    assert open_state({"SD_SHARED_STATE": server.url}).jobs.get("a1")[0].state == "queued"
    assert [state.rate_limit(1).wait_s("alice") > 0 for _ in range(2)] == [False, True]
