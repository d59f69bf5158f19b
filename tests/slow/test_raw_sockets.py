"""Bytes that no HTTP client would send get a 4xx or a closed connection within a time limit, and leave no trace in the server."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import re
import resource
import socket
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.http.servers import PLAIN_HTTP, ROOT, Server, serve

ANSWERED_WITHIN_S = 10
SEED = 20261125
IDLE_CONNECTIONS = 10_000
KEPT_DESCRIPTORS = 500  # for all other files that this process has open
BODY = json.dumps({"prompt": "a red circle", "num_inference_steps": 1, "seed": 1, "output_format": "png"}).encode()
HEAD = b"POST /txt2img HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
VALID = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
UPGRADE = b"GET /txt2img HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
MALFORMED_UPGRADES = (UPGRADE.replace(b"Host: x", b"Host: \xff") + b"\r\n", UPGRADE + b"Sec-WebSocket-Protocol: \xff\r\n\r\n")
FORGED_LINE = b"/%0A%7B%22time%22:%20%22never%22%7D%0A"


def connected(server: Server, read_buffer_bytes: int | None = None) -> socket.socket:
    client = socket.socket()
    if read_buffer_bytes is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, read_buffer_bytes)
    client.settimeout(ANSWERED_WITHIN_S)
    client.connect(server.address)
    return client


def response_to(server: Server, sent: bytes, patience_s: float = 0.0) -> bytes:
    """All bytes until the server closes the connection. After `patience_s` of silence the client half-closes."""
    received = b""
    with connected(server) as client, suppress(ConnectionResetError, BrokenPipeError):
        client.sendall(sent)
        client.settimeout(patience_s)
        with suppress(TimeoutError, BlockingIOError):
            while piece := client.recv(2**16):
                received += piece
            return received
        client.settimeout(ANSWERED_WITHIN_S)
        client.shutdown(socket.SHUT_WR)
        while piece := client.recv(2**16):
            received += piece
    return received


def first_response_to(server: Server, sent: bytes) -> bytes:
    """The head of the first response, or nothing if the server closes without one."""
    received = b""
    with connected(server) as client, suppress(ConnectionResetError, BrokenPipeError):
        client.sendall(sent)
        while b"\r\n\r\n" not in received and (piece := client.recv(2**16)):
            received += piece
    return received


def statuses(response: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"(?:^|[^\r])HTTP/1\.1 (\d{3}) ", b"\n" + response)]


def workers(server: Server) -> list[psutil.Process]:
    """The API workers."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    found = [one for one in family if any("http_api_server" in part for part in one.cmdline())]
    assert found
    return found


def descriptors(server: Server) -> int:
    """The open files of all workers, without the metrics files, which a worker opens at its first request and keeps open."""
    return sum("prometheus_multiproc_dir" not in target for one in workers(server) for target in _open_files(one.pid))


def _open_files(pid: int) -> Iterator[str]:
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed in the meantime
            yield str(link.readlink())


def megabytes(server: Server) -> float:
    return sum(one.memory_info().rss for one in workers(server)) / 2**20


def generate(server: Server) -> bytes:
    with server.client() as client:
        generated = client.post("/txt2img", content=BODY, headers={"Content-Type": "application/json"})
    assert generated.status_code == 200, generated.text
    return generated.content


def settled(server: Server, at_most: int) -> int:
    """Descriptors of the workers, once they are no more than `at_most`, or after a while."""
    deadline = time.monotonic() + 20
    while (count := descriptors(server)) > at_most and time.monotonic() < deadline:
        time.sleep(0.2)
    return count


@pytest.fixture
def unharmed(server: Server) -> Iterator[Server]:
    """The server, which after the test must generate the same image, have as many files open and have logged no traceback."""
    image = generate(server)
    before, memory_before, log_before = descriptors(server), megabytes(server), len(server.log)
    yield server
    assert generate(server) == image
    assert settled(server, before + 4) <= before + 4, "descriptors"
    assert megabytes(server) < memory_before + 100
    assert '\n{"time": "never"}' not in server.log
    assert "Traceback" not in server.log[log_before:]


@pytest.mark.parametrize(
    "sent",
    [
        CHUNKED + b"zz\r\nhello\r\n0\r\n\r\n",
        CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n",
        CHUNKED + b"ffffffffffffffffffffffff\r\nhello",
        CHUNKED + b"5\r\nhello!!!!\r\n0\r\n\r\n",
        CHUNKED + b"5;" + b"x" * 100_000 + b"\r\nhello\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n" + BODY,
        HEAD + b"Content-Length: 1e3\r\n\r\n" + BODY,
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + BODY,
        HEAD + b"Content-Length: 99999999999999999999\r\n\r\n" + BODY,
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"X: " + b"x" * 100_000 + b"\r\n\r\n",
        HEAD + b"X: y\r\n" * 20_000 + b"\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /%00%0a%ff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
        b"G\xc3\x84T / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /nothing\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        UPGRADE + b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        UPGRADE + b"\r\n",
        *MALFORMED_UPGRADES,
        UPGRADE.replace(b"/txt2img", FORGED_LINE) + b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        FORGED_LINE.join((b"GET ", b" HTTP/1.1\r\nHost: x\r\n\r\n")),
        b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http://example.com/ HTTP/1.1\r\nHost: x\r\n\r\n"[:-2] + b"Host: y\r\n\r\n",
        VALID.replace(b"application/json", b"application/json\xff"),
    ],
    ids=lambda sent: repr(sent[-40:]),
)
def test_bytes_that_are_not_a_request_are_refused(unharmed: Server, sent: bytes) -> None:
    began = time.monotonic()
    response = first_response_to(unharmed, sent)
    assert time.monotonic() - began < ANSWERED_WITHIN_S
    assert [400 <= status < 500 for status in statuses(response)] == [True], response[:300]
    assert b"Traceback" not in response


@pytest.mark.parametrize(
    "sent",
    [b"", HEAD, HEAD + b"Content-Length: 50\r\n\r\n", VALID[:40], VALID[:-20]],
    ids=["nothing", "half a head", "no body", "half a line", "half a body"],
)
def test_an_incomplete_request_of_a_disconnected_client_gets_no_response(unharmed: Server, sent: bytes) -> None:
    began = time.monotonic()
    assert response_to(unharmed, sent) == b""
    assert time.monotonic() - began < ANSWERED_WITHIN_S


def test_bytes_after_a_request_begin_the_next_request(unharmed: Server) -> None:
    pipelined = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" + VALID + b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert statuses(response_to(unharmed, pipelined, patience_s=5)) == [200, 200, 200]


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
HIDDEN = b"0\r\n\r\n" + SMUGGLED


def post(*headers: bytes, body: bytes = b"", path: bytes = b"/txt2img") -> bytes:
    return b"POST " + path + b" HTTP/1.1\r\nHost: x\r\n" + b"".join(header + b"\r\n" for header in headers) + b"\r\n" + body


@pytest.mark.parametrize(
    "sent",
    [
        post(b"Content-Length: %d" % len(HIDDEN), b"Transfer-Encoding: chunked", body=HIDDEN),
        post(b"Transfer-Encoding: chunked", b"Content-Length: %d" % len(HIDDEN), body=HIDDEN),
        post(b"Content-Length: 0", b"Transfer-Encoding: chunked", body=HIDDEN),
        post(b"Content-Length: 5", b"TRANSFER-ENCODING: Chunked", body=HIDDEN),
        post(b"Content-Length: 5", b"Transfer-Encoding: identity", body=HIDDEN),
        post(b"Content-Length: 5", b"Transfer-Encoding: xchunked", body=HIDDEN),
        post(b"Content-Length: 5", b"Transfer-Encoding : chunked", body=HIDDEN),
        post(b"Transfer-Encoding: chunked, identity", body=HIDDEN),
        post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity", body=HIDDEN),
        post(b"Content-Length: 5", b"Content-Length: %d" % len(HIDDEN), body=HIDDEN),
        post(b"Content-Length: 5, %d" % len(HIDDEN), body=HIDDEN),
        post(b"Content-Length: +5", body=HIDDEN),
        post(b"Content-Length: 0x5", body=HIDDEN),
        post(b"Content-Length: %d" % len(HIDDEN), b"Transfer-Encoding: chunked", body=HIDDEN, path=b"http://x/txt2img"),
        post(b"Content-Length: 5", b"Transfer-Encoding: chunked", b"Content-Encoding: gzip", body=HIDDEN),
        post(b"Transfer-Encoding: chunked", b"Content-Length: 5", body=HIDDEN).replace(b"HTTP/1.1", b"HTTP/1.0", 1),
        post(b"Transfer-Encoding: chunked", body=b"5\r\nhello" + HIDDEN),
        post(b"Transfer-Encoding: chunked", body=b"5\rhello\r\n" + HIDDEN),
        b"GET http://x/livez HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n" + SMUGGLED,
        b"GET http://x/livez HTTP/1.1\r\n\r\n" + SMUGGLED,
        b"GET http://x/livez\r\n\r\n" + SMUGGLED,
        b"GET http://x/livez \tHTTP/1.1\r\nHost: x\r\n\r\n" + SMUGGLED,
        b"GET http://x\r\n/livez HTTP/1.1\r\nHost: x\r\n\r\n" + SMUGGLED,
    ],
    ids=lambda sent: repr(sent[:100]),
)
def test_a_request_of_ambiguous_length_is_refused_and_smuggles_no_second_request(unharmed: Server, sent: bytes) -> None:
    """A proxy in front of the server may see the end elsewhere and send another client's request after it."""
    response = response_to(unharmed, sent, patience_s=5)
    assert [400 <= status < 502 for status in statuses(response)] == [True], response[:500]
    assert b"smuggled" not in response
    assert b"connection: close" in response.lower()


@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"br"])
def test_only_bytes_after_a_compressed_body_begin_the_next_request(unharmed: Server, coding: bytes) -> None:
    packed = {b"gzip": gzip.compress(BODY), b"deflate": zlib.compress(BODY), b"br": b"x"}[coding]
    head = (b"Content-Type: application/json", b"Content-Encoding: " + coding)
    last = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    first = 415 if coding == b"br" else 200
    whole = post(*head, b"Content-Length: %d" % len(packed), body=packed)
    assert statuses(response_to(unharmed, whole + last, patience_s=10)) == [first, 200]
    in_chunks = post(*head, b"Transfer-Encoding: chunked", body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(packed), packed))
    assert statuses(response_to(unharmed, in_chunks + last, patience_s=10)) == [first, 200]
    longer = packed + SMUGGLED
    behind = post(*head, b"Content-Length: %d" % len(longer), body=longer)
    assert statuses(response_to(unharmed, behind + last, patience_s=10)) == [415 if coding == b"br" else 400, 200]


ABSOLUTE = b"GET http://%b/%b HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("target_host", "host"),
    [(b"any.example", b"any.example"), (b"any.example", b"another.example"), (b"any.example:80", b""), (b"[::1]:3000", b"localhost")],
)
def test_the_absolute_form_works_with_any_host_and_never_echoes_it(server: Server, target_host: bytes, host: bytes) -> None:
    for path, status in ((b"status", 200), (b"/status/", 200), (b"nothing", 404), (b"", 200), (b"ui", 308)):
        response = response_to(server, ABSOLUTE % (target_host, path, host), patience_s=5)
        assert statuses(response) == [status], response[:300]
        assert b"any.example" not in response
        assert b"another.example" not in response


def test_a_half_closed_connection_gets_its_responses(unharmed: Server) -> None:
    with connected(unharmed) as client:
        client.sendall(b"GET //status/ HTTP/1.1\r\nHost: x\r\n\r\n" + VALID + VALID)
        client.shutdown(socket.SHUT_WR)
        response = b""
        while piece := client.recv(2**16):
            response += piece
    assert [status for status in statuses(response) if status != 100] == [200, 200, 200]
    assert response.count(generate(unharmed)) == 2


def test_a_half_closed_client_that_disconnects_is_noticed(unharmed: Server) -> None:
    slow = json.dumps({"prompt": "a red circle", "num_inference_steps": 150, "width": 256, "height": 256}).encode()
    before = unharmed.log.count("was cancelled after")
    for accept in (b"image/png", b"text/event-stream"):
        with connected(unharmed) as client:
            client.sendall(post(b"Content-Type: application/json", b"Accept: " + accept, b"Content-Length: %d" % len(slow), body=slow))
            client.shutdown(socket.SHUT_WR)
            time.sleep(2)
            assert unharmed.log.count("was cancelled after") == before, "the server still waits"
        before += 1
        left = time.monotonic()
        while unharmed.log.count("was cancelled after") < before:
            assert time.monotonic() - left < 15, accept
            time.sleep(0.05)


def mutated(random_numbers: random.Random) -> bytes:
    """Random bytes, or a request with some bytes changed, left out or repeated."""
    if random_numbers.random() < 0.3:
        return random_numbers.randbytes(random_numbers.randrange(1, 2000))
    sent = bytearray(random_numbers.choice((VALID, CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY))))
    for _ in range(random_numbers.randrange(1, 6)):
        place = random_numbers.randrange(len(sent))
        change = random_numbers.choice(("set", "drop", "repeat"))
        if change == "set":
            sent[place] = random_numbers.randrange(256)
        elif change == "drop":
            del sent[place : place + random_numbers.randrange(1, 20)]
        else:
            sent[place:place] = sent[place : place + 20] * random_numbers.randrange(1, 10)
        sent = sent or bytearray(b"\r")
    return bytes(sent)


def test_random_and_mutated_requests_never_cause_an_internal_error(unharmed: Server) -> None:
    random_numbers = random.Random(SEED)
    sent = [mutated(random_numbers) for _ in range(400)]
    with ThreadPoolExecutor(32) as threads:  # mostly waiting
        responses = list(threads.map(lambda one: statuses(response_to(unharmed, one, patience_s=0.3)), sent))
    for one, answered in zip(sent, responses, strict=True):
        assert all(status < 500 or status == 503 for status in answered), one
    counts = Counter(status for answered in responses for status in answered)
    print(f"statuses: {dict(counts)}")
    assert counts[400] > 100


def test_requests_do_not_leak_memory(unharmed: Server) -> None:
    asking = b"HEAD /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    with connected(unharmed) as client:

        def ask(count: int) -> None:
            for _ in range(count):
                client.sendall(asking)
                assert client.recv(2**12).startswith(b"HTTP/1.1 200")

        ask(500)
        before = megabytes(unharmed)
        ask(3000)
        grown = megabytes(unharmed) - before
    print(f"3000 requests keep {grown:.1f} MiB")
    assert grown < 5


def idle_connections() -> int:
    """The number of connections that this process and each worker may have open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return min(IDLE_CONNECTIONS, hard - KEPT_DESCRIPTORS)


async def opened(address: tuple[str, int], count: int) -> list[socket.socket]:
    clients = []
    for number in range(count):
        client = socket.socket()
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, address)
        clients.append(client)
        if number % 500 == 499:
            await asyncio.sleep(0.05)  # the server accepts them
    return clients


def test_ten_thousand_idle_connections_block_no_other_client(unharmed: Server) -> None:
    before, count = descriptors(unharmed), idle_connections()
    began = time.monotonic()
    clients = asyncio.run(opened(unharmed.address, count))
    try:
        while descriptors(unharmed) < before + count:
            assert time.monotonic() - began < 40, f"{descriptors(unharmed) - before} of {count} were accepted"
            time.sleep(0.1)
        opened_s = time.monotonic() - began
        with unharmed.client() as client:
            asked = time.monotonic()
            assert client.get("/livez").status_code == 200
            livez_s = time.monotonic() - asked
        asked = time.monotonic()
        generate(unharmed)
        print(f"{count} idle connections in {opened_s:.1f} s: /livez after {livez_s:.3f} s, a image after {time.monotonic() - asked:.2f} s")
        assert livez_s < 1
    finally:
        for one in clients:
            one.close()


def test_a_real_server_disconnects_slow_clients(tmp_path: Path) -> None:
    """A server of the real service with short time limits."""
    folder = tmp_path / "quick"
    folder.mkdir()
    (folder / "service.py").write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}]\n"
        "from stable_diffusion.server import connections\nfrom stable_diffusion.web import body\n"
        "body.UPLOAD_PAUSE_S, connections.IDLE_TIMEOUT_S = 1.0, 3.0\n"
        "connections.READING_PAUSE_S, connections.CHECK_EVERY_S = 1.0, 0.2\n"
        "from fp32.service import svc\n"
    )
    variables = {"SD_MODEL": "demo", "BENTOML_CONFIG": str(ROOT / "fp32" / "configuration.yaml")}
    with serve(folder, "service:svc", tmp_path, variables) as server:
        generate(server)
        before = descriptors(server)
        with connected(server) as uploading:
            uploading.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
            response = uploading.recv(2**16)
            assert response.startswith(b"HTTP/1.1 408 ")
            assert b"connection: close" in response.lower()
            assert b"request_timeout" in response + uploading.recv(2**16)
        with connected(server, read_buffer_bytes=4096) as reading:
            # Together they exceed what the operating system buffers for a client that does not read.
            reading.sendall(b"GET /static_content/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n" * 8)
            deadline = time.monotonic() + 20
            while "did not read its response in time" not in server.log:
                assert time.monotonic() < deadline, server.log[-2000:]
                time.sleep(0.2)
        with connected(server) as idle:
            idle.sendall(b"GET /livez HTTP/1.1\r\nHo")
            assert idle.recv(10) == b""
        assert settled(server, before + 4) <= before + 4
        for malformed in MALFORMED_UPGRADES:
            assert statuses(first_response_to(server, malformed)) == [405]
        assert "Traceback" not in server.log
        assert httpx.get(f"{server.url}/livez", **PLAIN_HTTP).status_code == 200
        server.process.terminate()
        assert server.process.wait(20) == 0, "none of them keeps it from stopping"
