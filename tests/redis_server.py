"""A real Redis or Valkey on a free port of loopback, in a folder of its own; and a way to a server that can be cut off or slow."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.http.servers import free_port

PROGRAM = shutil.which("redis-server") or shutil.which("valkey-server")
needs_redis_server = pytest.mark.skipif(PROGRAM is None, reason="redis-server is not installed (Debian: redis-server)")
_TURN_TIMEOUT_S = 20


class RedisServer:
    """Writes every change into its append-only file before it answers, so that a killed one has lost nothing when it is started again."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self, **changes: Any) -> Any:
        import redis

        return redis.Redis(**{"host": "127.0.0.1", "port": self.port, "socket_timeout": 5, **changes})

    def start(self) -> None:
        assert PROGRAM is not None
        command = [PROGRAM, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder), "--save", ""]
        command += ["--appendonly", "yes", "--appendfsync", "always", *self._options]
        with (self._folder / "redis.log").open("a") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + _TURN_TIMEOUT_S
        while not self._accepts_connections():
            assert self._process.poll() is None, (self._folder / "redis.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def _accepts_connections(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as connection:
            connection.sendall(b"PING\r\n")
            return not connection.recv(100).startswith(b"-LOADING")
        return False

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@contextmanager
def started(folder: Path, *options: str) -> Iterator[RedisServer]:
    server = RedisServer(folder, *options)
    server.start()
    try:
        yield server
    finally:
        server.kill()


class Way:
    """A TCP proxy to a port of loopback.

    `delay_s`: each piece that a client sends is held for so long. `is_blocked`: nothing gets through.
    """

    def __init__(self, port: int) -> None:
        self.target = port  # of new connections
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.delay_s = 0.0
        self.is_blocked = False
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def close(self) -> None:
        self.cut()
        _close(self._listening)

    def cut(self) -> None:
        """Break all connections. New ones get through."""
        broken, self._sockets = self._sockets, []
        for one in broken:
            _close(one)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            self._sockets.append(client)
            try:
                store = socket.create_connection(("127.0.0.1", self.target), 5)
            except OSError:
                client.close()
                continue
            self._sockets.append(store)
            threading.Thread(target=self._carry, args=(client, store, True), daemon=True).start()
            threading.Thread(target=self._carry, args=(store, client, False), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, is_slow: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                if is_slow:
                    time.sleep(self.delay_s)
                while self.is_blocked:
                    time.sleep(0.01)
                target.sendall(piece)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


def _close(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()


@contextmanager
def way_to(server: RedisServer) -> Iterator[Way]:
    way = Way(server.port)
    try:
        yield way
    finally:
        way.is_blocked = False
        way.close()


def let_pass(server: RedisServer, seconds: float) -> None:
    """Make the store's content older, as if machines had been watching it for so long. The store's clock cannot be set."""
    with server.client() as client:
        for key in client.keys("*"):
            _age(client, key, seconds)


def _age(client: Any, key: bytes, seconds: float) -> None:
    kind = client.type(key)
    if kind == b"zset":
        for member, score in client.zrange(key, 0, -1, withscores=True):
            client.zadd(key, {member: score - seconds})
    elif kind == b"hash":
        for field, value in client.hgetall(key).items():
            if field.endswith(b"_at"):
                is_last_look = key.endswith(b":watch") and field == b"last_at"  # just now, but not in this second
                client.hset(key, field, f"{float(value) - (min(seconds, 2) if is_last_look else seconds):.6f}")
    elif b":rate:" in key:
        client.set(key, f"{float(client.get(key)) - seconds:.6f}", keepttl=True)
    if (left_ms := client.pttl(key)) > 0:
        client.pexpire(key, max(1, left_ms - round(seconds * 1000)))
        if left_ms <= seconds * 1000:
            client.delete(key)
