"""Time limits for the connections of clients to an API worker, which neither uvicorn nor BentoML sets.

Closes connections that are idle too long, and those whose client does not read the response. `half_closed.py` handles connections that the
client has half-closed. Refuses WebSockets, which no API here uses: if the first request of one is malformed, uvicorn keeps it for ever and
cannot stop.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import resource
import socket
import stat
import struct
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import anyio
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_diffusion.server.half_closed import HalfClosable

logger = logging.getLogger("stable_diffusion")

# A connection is idle once it has had no request in progress, and the client has read nothing of the last response, for this long.
IDLE_TIMEOUT_S = 60.0
# A client that reads nothing of its response for READING_PAUSE_S is too slow; so is one for which the server has waited longer than
# READING_GRACE_S plus a second for each READING_BYTES_PER_S sent.
READING_PAUSE_S = 60.0
READING_GRACE_S = 60.0
READING_BYTES_PER_S = 16 * 2**10
CHECK_EVERY_S = 5.0
_PIECE_BYTES = 64 * 2**10  # as much as uvicorn buffers before it waits for the client
# For clients that disappear without closing: the operating system probes the connection and gives up after about two minutes.
_KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4, socket.TCP_USER_TIMEOUT: 120_000}
_RESET_WHEN_CLOSED = struct.pack("ii", 1, 0)  # drops unread data


@dataclass
class _Idle:
    """A connection without a request in progress: since when, and how many bytes of the last response are still unread."""

    inode: int
    since_s: float
    unread_bytes: int

    def __post_init__(self) -> None:
        self.changed_s = self.since_s
        self.read_until_s = self.since_s + READING_GRACE_S + self.unread_bytes / READING_BYTES_PER_S

    def is_over(self, unread_bytes: int, now_s: float) -> bool:
        if unread_bytes != self.unread_bytes:
            self.unread_bytes, self.changed_s = unread_bytes, now_s
        return now_s - self.changed_s >= IDLE_TIMEOUT_S or (unread_bytes > 0 and now_s >= self.read_until_s)


class Connections:
    """The outermost middleware of an API worker.

    uvicorn waits for ever for a client that sends nothing or an incomplete head, and for one that does not read its response: it keeps
    the connection and all queued responses in memory, and does not stop before all connections are closed. uvicorn's keep-alive timer
    stays in charge of connections between two requests: load balancers pool them, and a server that closes one first loses a request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        # The number of requests in progress per connection. Not by file descriptor: a response may outlive its connection, and another
        # connection may then have the descriptor.
        self._in_progress: dict[asyncio.WriteTransport, int] = {}
        self._idle: dict[int, _Idle] = {}  # by file descriptor
        self._ports: set[int] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            raise_descriptor_limit()
            _configure_uvicorn(receive)
            self._ports = _prepare_listening_sockets()
            watching = asyncio.create_task(self._watch_idle_connections())
            try:
                return await self._app(scope, receive, send)
            finally:
                watching.cancel()
        transport = _transport_of(receive)
        if transport is None:  # not served by uvicorn: connections cannot be assigned to requests, so none is closed
            self._ports = set()
            return await self._app(scope, receive, send)
        with self._counted_as_in_progress(transport):
            await self._app(scope, receive, _TimedResponse(send, transport).send)

    @contextmanager
    def _counted_as_in_progress(self, transport: asyncio.WriteTransport) -> Iterator[None]:
        self._in_progress[transport] = self._in_progress.get(transport, 0) + 1
        try:
            yield
        finally:
            self._in_progress[transport] -= 1
            if not transport.is_closing():
                self._idle.pop(_descriptor_of(transport), None)

    async def _watch_idle_connections(self) -> None:
        while True:
            await asyncio.sleep(CHECK_EVERY_S)
            self._close_idle_connections(time.monotonic())

    def _close_idle_connections(self, now_s: float) -> None:
        """Close connections that have been idle too long. Takes about 2 ms for 1,000 connections."""
        sockets = dict(_open_sockets()) if self._ports else {}
        for descriptor in [*self._idle]:
            if self._idle[descriptor].inode != sockets.get(descriptor):
                del self._idle[descriptor]  # closed, or another socket now has the descriptor
        self._in_progress = {one: count for one, count in self._in_progress.items() if count or not one.is_closing()}
        transports = {_descriptor_of(one): one for one in self._in_progress if not one.is_closing()}
        for descriptor, inode in sockets.items():
            transport, unread_bytes = transports.get(descriptor), _unread_bytes(descriptor)
            if transport is not None and (self._in_progress[transport] or (not unread_bytes and _is_kept_alive(transport))):
                self._idle.pop(descriptor, None)
                continue
            idle = self._idle.setdefault(descriptor, _Idle(inode, now_s, unread_bytes))
            if idle.is_over(unread_bytes, now_s):
                _close_if_accepted(descriptor, self._ports, reset=unread_bytes > 0)
                # A socket that is not a client's stays open and is checked again.
                self._idle[descriptor] = _Idle(inode, now_s, unread_bytes)


class _TimedResponse:
    """A response that the client must read in time."""

    def __init__(self, send: Send, transport: asyncio.WriteTransport) -> None:
        self._send = send
        self._transport = transport
        self._sent_bytes = 0
        self._waited_s = 0.0

    async def send(self, message: Message) -> None:
        if self._transport.is_closing():
            await asyncio.sleep(0)  # lets uvicorn, which has refused the request's body, notice that the connection is closed
            return
        for piece in _pieces(message):
            began_s = time.monotonic()
            left_s = READING_GRACE_S + self._sent_bytes / READING_BYTES_PER_S - self._waited_s
            with anyio.move_on_after(min(READING_PAUSE_S, left_s)) as waiting:
                await self._send(piece)
            if waiting.cancelled_caught:
                logger.warning("A client did not read its response in time: the connection was closed after %d bytes.", self._sent_bytes)
                await self._abort()
                return
            self._waited_s += time.monotonic() - began_s
            self._sent_bytes += len(piece.get("body", b""))

    async def _abort(self) -> None:
        """Abort the connection. The application then sees a client that has disconnected."""
        self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_WHEN_CLOSED)
        self._transport.abort()
        await asyncio.sleep(0)  # lets uvicorn notice


def _pieces(message: Message) -> Iterator[Message]:
    """Split a message: uvicorn waits for the client between messages, not within one."""
    body = memoryview(message.get("body", b""))
    if len(body) <= _PIECE_BYTES:
        yield message
        return
    for begin in range(0, len(body), _PIECE_BYTES):
        is_last = begin + _PIECE_BYTES >= len(body)
        more_body = message.get("more_body", False) if is_last else True
        yield {**message, "body": bytes(body[begin : begin + _PIECE_BYTES]), "more_body": more_body}


def _configure_uvicorn(receive: Any) -> None:
    """Refuse WebSockets and respond on half-closed connections. BentoML cannot pass such options; uvicorn reads them per connection."""
    configuration = getattr(getattr(receive, "__self__", None), "config", None)
    if isinstance(configuration, uvicorn.Config):
        configuration.ws_protocol_class = None
        configuration.http_protocol_class = HalfClosable


def _transport_of(receive: Any) -> asyncio.WriteTransport | None:
    """The connection of a request. ASGI does not expose it, but uvicorn's `receive` is a method of an object that holds it."""
    transport: asyncio.WriteTransport | None = getattr(getattr(receive, "__self__", None), "transport", None)
    return transport


def _descriptor_of(transport: asyncio.WriteTransport) -> int:
    """The file descriptor of a transport that is not closing."""
    descriptor: int = transport.get_extra_info("socket").fileno()
    return descriptor


def _is_kept_alive(transport: asyncio.WriteTransport) -> bool:
    """Whether a complete response was sent and nothing has arrived since: uvicorn's timer runs until the next request's first byte."""
    return getattr(transport.get_protocol(), "timeout_keep_alive_task", None) is not None


def _unread_bytes(descriptor: int) -> int:
    """The bytes of a response that the client has not acknowledged; 0 if the descriptor is not a connection."""
    with suppress(OSError):
        return int(struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, b"\0" * 4))[0])
    return 0


def raise_descriptor_limit() -> None:
    """Each connection needs a file descriptor: raise the limit to the maximum that the operating system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _open_sockets() -> Iterator[tuple[int, int]]:
    """File descriptors and inodes of this process's sockets."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor of the listing itself
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                yield int(name), status.st_ino


@contextmanager
def _opened(descriptor: int) -> Iterator[socket.socket]:
    with socket.socket(fileno=os.dup(descriptor)) as opened:
        yield opened


def _prepare_listening_sockets() -> set[int]:
    """Set keep-alive options, which connections inherit. Returns the ports."""
    ports = set()
    for descriptor, _ in _open_sockets():
        with _opened(descriptor) as one:
            is_tcp = one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM
            if is_tcp and one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in _KEEPALIVE.items():
                    one.setsockopt(socket.IPPROTO_TCP, option, value)
                ports.add(one.getsockname()[1])
    return ports


def _close_if_accepted(descriptor: int, ports: set[int], *, reset: bool) -> None:
    """Close the connection if it is a client's. The event loop then finds it closed. `reset` drops unread data."""
    with suppress(OSError), _opened(descriptor) as one:
        if one.family not in (socket.AF_INET, socket.AF_INET6) or one.getsockname()[1] not in ports:
            return
        if not one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            if reset:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_WHEN_CLOSED)
            one.shutdown(socket.SHUT_RDWR)
