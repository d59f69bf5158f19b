"""Clients that do not read, do not write or half-close, against a real uvicorn on a thread, with short time limits."""

from __future__ import annotations

import asyncio
import http.client
import resource
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from stable_diffusion.server import connections, half_closed
from stable_diffusion.server.connections import Connections

IMAGE = bytes(range(256)) * 2**15  # 8 MiB, more than the operating system buffers
TAIL = bytes(range(256)) * 2**10  # 256 KiB, which it buffers whole


@dataclass
class Worker:
    """A server with the middleware under test and endpoints that are slow, large or endless."""

    server: uvicorn.Server
    port: int
    cancelled: threading.Event  # set when the source of /endless is cancelled
    left: list[float]  # when the disconnect of a client of /waiting was noticed

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)

    @property
    def descriptors(self) -> set[int]:
        return {protocol.transport.get_extra_info("socket").fileno() for protocol in self.server.server_state.connections}

    def connect(self, *, read_buffer_bytes: int | None = None) -> socket.socket:
        client = socket.socket()
        if read_buffer_bytes is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, read_buffer_bytes)
        client.settimeout(20)
        client.connect(("127.0.0.1", self.port))
        return client

    def request(self, path: str) -> socket.socket:
        """Send a GET request for `path` on a connection with a small receive buffer."""
        client = self.connect(read_buffer_bytes=4096)
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        return client

    def seconds_until_connections(self, count: int, timeout_s: float = 20) -> float:
        began = time.monotonic()
        while self.connections != count:
            assert time.monotonic() - began < timeout_s, f"{self.connections} connections"
            time.sleep(0.01)
        return time.monotonic() - began


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    for name, seconds in {"IDLE_TIMEOUT_S": 1.0, "READING_PAUSE_S": 1.0, "READING_GRACE_S": 2.0, "CHECK_EVERY_S": 0.1}.items():
        monkeypatch.setattr(connections, name, seconds)
    monkeypatch.setattr(half_closed, "PATIENCE_S", 0.5)

    cancelled = threading.Event()
    left: list[float] = []

    async def image(request: Request) -> Response:
        return Response(IMAGE)

    async def tail(request: Request) -> Response:
        return Response(TAIL)

    async def slow(request: Request) -> Response:
        await asyncio.sleep(3)
        return Response(b"done")

    async def waiting(request: Request) -> Response:
        while (await request.receive())["type"] != "http.disconnect":
            continue
        left.append(time.monotonic())
        return Response()

    async def length(request: Request) -> Response:
        return Response(str(len(await request.body())).encode())

    async def endless(request: Request) -> Response:
        async def events() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"data: x\n\n" * 1000
                    await asyncio.sleep(0)
            finally:
                cancelled.set()

        return StreamingResponse(events())

    routes = [Route("/image", image), Route("/tail", tail), Route("/slow", slow), Route("/endless", endless)]
    routes += [Route("/waiting", waiting), Route("/length", length, methods=["POST"])]
    app = Starlette(routes=routes, middleware=[Middleware(Connections)])
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * len(TAIL))
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_config=None))
        worker = Worker(server, listening.getsockname()[1], cancelled, left)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield worker
        finally:
            server.should_exit = True
            thread.join(20)
        assert not thread.is_alive(), "the server did not stop"


def everything(client: socket.socket, pause_s: float = 0.0, piece_bytes: int = 2**16) -> bytes:
    """All bytes until the server closes the connection."""
    received = bytearray()
    while piece := client.recv(piece_bytes):
        received += piece
        time.sleep(pause_s)
    return bytes(received)


def test_a_client_that_reads_gets_the_whole_response(worker: Worker) -> None:
    assert httpx.get(f"http://127.0.0.1:{worker.port}/image", trust_env=False).content == IMAGE


def test_a_client_that_reads_slowly_but_steadily_gets_its_response(worker: Worker) -> None:
    with worker.connect(read_buffer_bytes=2**17) as client:
        client.sendall(b"GET /image HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert everything(client, pause_s=0.05, piece_bytes=2**17).endswith(IMAGE)


def test_the_connection_is_reset_if_the_client_does_not_read_the_response(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    with worker.request("/image") as client:
        worker.seconds_until_connections(1)
        assert 0.5 < worker.seconds_until_connections(0) < 5
        with pytest.raises(ConnectionResetError):
            everything(client)
    assert [record.levelname for record in caplog.records] == ["WARNING"], "a slow client is not an error"
    assert "did not read its response in time" in caplog.text


def test_the_connection_is_reset_if_the_client_reads_byte_by_byte(worker: Worker) -> None:
    with worker.request("/image") as client:
        worker.seconds_until_connections(1)
        began = time.monotonic()
        with pytest.raises(ConnectionResetError):
            everything(client, pause_s=0.1, piece_bytes=512)
        assert time.monotonic() - began < 15
        assert worker.connections == 0


def test_an_event_stream_that_is_not_read_ends_its_source(worker: Worker) -> None:
    with worker.request("/endless"):
        assert worker.cancelled.wait(10)
        worker.seconds_until_connections(0)


@pytest.mark.parametrize("sent", [b"", b"GET /image HT", b"GET /image HTTP/1.1\r\nHost: x\r\n"], ids=["nothing", "a line", "a head"])
def test_a_connection_without_a_complete_request_is_closed(worker: Worker, sent: bytes) -> None:
    with worker.connect() as client:
        client.sendall(sent)
        worker.seconds_until_connections(1)
        assert 0.5 < worker.seconds_until_connections(0) < 5
        assert everything(client) == b""


def test_a_connection_whose_request_head_trickles_is_closed(worker: Worker) -> None:
    with worker.connect() as client:
        worker.seconds_until_connections(1)
        began = time.monotonic()
        with suppress(BrokenPipeError, ConnectionResetError):
            for byte in b"GET /image HTTP/1.1\r\nX: " + b"x" * 1000:
                client.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - began < 5


def test_a_connection_waiting_for_its_response_is_not_idle(worker: Worker) -> None:
    assert httpx.get(f"http://127.0.0.1:{worker.port}/slow", trust_env=False, timeout=20).content == b"done"


def test_a_connection_with_occasional_requests_is_not_idle(worker: Worker) -> None:
    with worker.connect() as client:
        for _ in range(6):
            client.sendall(b"HEAD /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 404")
            time.sleep(0.5)


def test_a_response_that_outlives_its_connection_leaves_the_next_one_on_its_descriptor_alone(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    with worker.connect() as first, socket.socket() as second:
        first.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(1.5)
        before = worker.descriptors
        first.shutdown(socket.SHUT_RDWR)  # keeps the client's descriptor open; the server's becomes free
        worker.seconds_until_connections(0)
        second.settimeout(20)
        second.connect(("127.0.0.1", worker.port))
        second.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        worker.seconds_until_connections(1)
        assert worker.descriptors == before
        assert second.recv(4096).startswith(b"HTTP/1.1 200")
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_all_pipelined_requests_get_a_response(worker: Worker) -> None:
    with worker.connect() as client:
        client.sendall(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\nGET /slow HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert everything(client).endswith(b"done")


def test_uvicorn_times_kept_alive_connections_until_a_partial_request_arrives(worker: Worker) -> None:
    """Load balancers pool such connections for their next requests."""
    with worker.connect() as client:
        for _ in range(2):
            client.sendall(b"HEAD /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 404")
            time.sleep(2.5)  # uvicorn waits for 5 s
        client.sendall(b"HEAD /nothing HTTP/1.1\r\nHo")
        assert 0.5 < worker.seconds_until_connections(0) < 4
        assert everything(client) == b""


def test_a_client_may_take_its_time_to_read_the_buffered_end_of_a_response(worker: Worker) -> None:
    """The application has sent everything; the operating system buffers the rest."""
    with worker.request("/tail") as client:
        received, began = b"", time.monotonic()
        while not received.endswith(TAIL):
            received += client.recv(4096)
            time.sleep(0.03)
        assert time.monotonic() - began > 1.5


def test_the_connection_is_reset_if_the_buffered_end_of_a_response_is_not_read(worker: Worker) -> None:
    with worker.request("/tail") as client:
        worker.seconds_until_connections(1)
        assert 0.5 < worker.seconds_until_connections(0) < 4
        with pytest.raises(ConnectionResetError):
            everything(client)


def test_a_request_with_a_malformed_body_logs_no_error(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    """Both uvicorn and the application send a response."""
    with worker.connect() as client:
        client.sendall(b"POST /nothing HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
        assert everything(client).startswith(b"HTTP/1.1 400 ")
    worker.seconds_until_connections(0)
    assert [record.levelname for record in caplog.records if record.levelname == "ERROR"] == []


def test_clients_that_do_not_read_do_not_delay_the_shutdown(worker: Worker) -> None:
    with worker.request("/image"), worker.request("/endless"), worker.connect():
        worker.seconds_until_connections(3)
        worker.server.should_exit = True
        worker.seconds_until_connections(0)


def half_closed_response(worker: Worker, sent: bytes, read_buffer_bytes: int | None = None) -> bytes:
    """All bytes that a client receives after sending `sent` and half-closing, without the interim responses."""
    with worker.connect(read_buffer_bytes=read_buffer_bytes) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        return everything(client).replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")


def get(path: str, version: str = "1.1") -> bytes:
    return f"GET {path} HTTP/{version}\r\nHost: x\r\n\r\n".encode()


def test_a_half_closed_client_gets_its_response(worker: Worker) -> None:
    assert half_closed_response(worker, get("/nothing")).startswith(b"HTTP/1.1 404 ")
    assert half_closed_response(worker, get("/slow")).endswith(b"done")
    assert half_closed_response(worker, get("/image"), read_buffer_bytes=4096).endswith(IMAGE)
    body = b"x" * 300_000  # more than uvicorn reads ahead
    sent = b"POST /length HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    assert half_closed_response(worker, sent).endswith(b"\r\n300000")
    worker.seconds_until_connections(0, timeout_s=1)


def test_a_half_closed_client_gets_all_its_responses(worker: Worker) -> None:
    """Also for pipelined requests, and with an incomplete request at the end."""
    responses = half_closed_response(worker, get("/slow") + get("/nothing") + get("/slow"))
    assert [responses.count(one) for one in (b"done", b"HTTP/1.1 404 ")] == [2, 1]
    unfinished = b"POST /length HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345"
    responses = half_closed_response(worker, get("/slow") + unfinished)
    assert responses.count(b"HTTP/1.1 ") == 1
    assert responses.endswith(b"done")


def test_a_real_client_skips_the_interim_responses_on_a_half_closed_connection(worker: Worker) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", worker.port, timeout=20)
    connection.request("GET", "/slow")
    connection.sock.shutdown(socket.SHUT_WR)
    response = connection.getresponse()
    assert (response.status, response.read()) == (200, b"done")
    connection.close()


def test_a_half_closed_http_1_0_client_gets_only_a_response_that_begins_soon(worker: Worker) -> None:
    assert half_closed_response(worker, get("/nothing", "1.0")).startswith(b"HTTP/1.1 404 ")
    with worker.connect() as client:
        client.sendall(get("/slow", "1.0"))
        client.shutdown(socket.SHUT_WR)
        assert everything(client) == b"", "HTTP/1.0 has no interim responses"


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_disconnected_client_is_told_apart_from_a_half_closed_one(worker: Worker, version: str) -> None:
    with worker.connect() as client:
        client.sendall(get("/waiting", version))
        worker.seconds_until_connections(1)
        time.sleep(0.2)
    began = time.monotonic()
    worker.seconds_until_connections(0)
    while not worker.left:
        assert time.monotonic() - began < 5
        time.sleep(0.01)
    assert worker.left[0] - began < 2


def test_a_half_closed_client_that_disconnects_is_noticed(worker: Worker) -> None:
    with worker.connect() as client:
        client.sendall(get("/waiting"))
        client.shutdown(socket.SHUT_WR)
        time.sleep(1)
        assert (worker.left, worker.connections) == ([], 1)
    assert worker.seconds_until_connections(0) < 5


def test_an_event_stream_ends_when_a_half_closed_client_disconnects(worker: Worker) -> None:
    with worker.connect() as client:
        client.sendall(get("/endless"))
        client.shutdown(socket.SHUT_WR)
        assert len(client.recv(2**16)) > 0
        assert not worker.cancelled.wait(0.5)
    assert worker.cancelled.wait(10)
    worker.seconds_until_connections(0)


def test_half_closing_without_a_complete_request_closes_the_connection(worker: Worker) -> None:
    for sent in (b"", b"GET /pic", b"POST /length HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345"):
        assert half_closed_response(worker, sent) == b""
    with worker.connect() as client:
        client.sendall(get("/nothing").replace(b"GET", b"HEAD"))
        assert client.recv(4096).startswith(b"HTTP/1.1 404")
        client.shutdown(socket.SHUT_WR)
        assert everything(client) == b""
    worker.seconds_until_connections(0, timeout_s=1)


def test_connections_inherit_the_keep_alive_options(worker: Worker) -> None:
    with worker.connect():
        worker.seconds_until_connections(1)
        (protocol,) = worker.server.server_state.connections
        accepted = protocol.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 120_000


def test_the_descriptor_limit_is_raised_to_the_hard_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        connections.raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
