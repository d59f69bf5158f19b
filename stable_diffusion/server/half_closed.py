"""Responds to clients that close their side of the connection after sending the request, and detects clients that have disconnected.

uvicorn treats both as disconnected: https://github.com/Kludex/uvicorn/issues/1264. Does not know the responses.
"""

from __future__ import annotations

import asyncio
import socket

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# Both kinds of client send the same FIN. A disconnected one resets the connection when it is sent something, so the server probes it.
_FIRST_PAUSE_S = 0.1  # before the first probe; doubled after each, since a proxy in between may be slow to pass the reset on
_LONGEST_PAUSE_S = 5.0
# HTTP/1.0 has no interim responses, so its clients cannot be probed. A response to one must begin within this time.
PATIENCE_S = 2.0
_TCP_CLOSE = 7  # Linux's number for the state of a connection that the other side has reset


class HalfClosable(H11Protocol):
    """uvicorn's protocol, but a half-closed connection stays open until all received requests have their responses.

    Until a response begins, the probe is the interim response 100 Continue: clients must accept any number of those (RFC 9110, 15.2).
    Once it has begun, its own pieces serve as probes.
    """

    _watching: asyncio.Task[None] | None = None  # set once the client has closed its side

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays open. asyncio calls this again if reading was paused and is resumed."""
        if self.scheme != "http" or not self._owes_response():  # TLS has no half-closed connections in asyncio
            return False
        if self._watching is None:
            self._watching = self.loop.create_task(self._watch())
        return True

    def on_response_complete(self) -> None:
        super().on_response_complete()  # begins the next request, if there is one
        if self._watching is not None and not self._owes_response():
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watching is not None:
            self._watching.cancel()
        super().connection_lost(exc)

    def _owes_response(self) -> bool:
        """Whether a complete request has arrived whose response is not complete."""
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    async def _watch(self) -> None:
        began_s, pause_s = self.loop.time(), _FIRST_PAUSE_S
        while not self.transport.is_closing():
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            if self._is_reset() or self._is_out_of_patience(self.loop.time() - began_s):
                self.transport.abort()
                return
            self._probe()

    def _is_reset(self) -> bool:
        connection = self.transport.get_extra_info("socket")
        state: int = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        return state == _TCP_CLOSE

    def _is_out_of_patience(self, waited_s: float) -> bool:
        return not self._may_probe() and not self.cycle.response_started and waited_s >= PATIENCE_S

    def _may_probe(self) -> bool:
        return self.scope["http_version"] != "1.0"

    def _probe(self) -> None:
        if self._may_probe() and self.conn.our_state is h11.SEND_RESPONSE and not self.cycle.response_started:
            self.transport.write(self.conn.send(h11.InformationalResponse(status_code=100, headers=[], reason="Continue")))
