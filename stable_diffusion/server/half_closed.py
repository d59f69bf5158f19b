"""Answers clients that close their side of the connection once their request is sent, and notices those that are gone.

uvicorn takes both for gone: https://github.com/Kludex/uvicorn/issues/1264. Does not know what is answered.
"""

from __future__ import annotations

import asyncio
import socket

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# What a client that has closed says is the same in both cases. One that is gone refuses what is sent to it, so it is sent something.
_FIRST_PAUSE_S = 0.1  # before the first time, doubled each time: something between the client and the server may be slow to tell
_LONGEST_PAUSE_S = 5.0
# A client of HTTP/1.0 knows no interim responses. Its answer has so long to begin.
PATIENCE_S = 2.0
_TCP_CLOSE = 7  # the state of a connection that the other side has refused; the operating system's name


class HalfClosable(H11Protocol):
    """uvicorn's protocol, which keeps a connection until the requests that have come are answered.

    While an answer is awaited, an interim response, 100 Continue, is sent now and then. A client must read any number of those
    (RFC 9110, 15.2), and all do. Of an answer that has begun, its own pieces tell whether somebody reads it.
    """

    _watching: asyncio.Task[None] | None = None  # set once the client has closed its side

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays open. asyncio calls this again if reading was paused and is resumed."""
        if self.scheme != "http" or not self._is_waited_for():  # TLS has no half-closed connections in asyncio
            return False
        if self._watching is None:
            self._watching = self.loop.create_task(self._watch())
        return True

    def on_response_complete(self) -> None:
        super().on_response_complete()  # begins the next request, if there is one
        if self._watching is not None and not self._is_waited_for():
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watching is not None:
            self._watching.cancel()
        super().connection_lost(exc)

    def _is_waited_for(self) -> bool:
        """Whether a whole request has come, and is not answered."""
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    async def _watch(self) -> None:
        began_s, pause_s = self.loop.time(), _FIRST_PAUSE_S
        while not self.transport.is_closing():
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            if self._is_refused() or self._is_out_of_patience(self.loop.time() - began_s):
                self.transport.abort()
                return
            self._ask()

    def _is_refused(self) -> bool:
        connection = self.transport.get_extra_info("socket")
        state: int = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        return state == _TCP_CLOSE

    def _is_out_of_patience(self, waited_s: float) -> bool:
        return not self._may_ask() and not self.cycle.response_started and waited_s >= PATIENCE_S

    def _may_ask(self) -> bool:
        return self.scope["http_version"] != "1.0"

    def _ask(self) -> None:
        if self._may_ask() and self.conn.our_state is h11.SEND_RESPONSE and not self.cycle.response_started:
            self.transport.write(self.conn.send(h11.InformationalResponse(status_code=100, headers=[], reason="Continue")))
