"""What the front door asks of a dialect: its routes, which paths are its own, and how it says that a request is refused."""

from __future__ import annotations

from typing import Protocol

from starlette.responses import Response
from starlette.routing import Route

from stable_diffusion.api.context import Context


class Dialect(Protocol):
    """What an API package offers, as a module."""

    @property
    def PREFIXES(self) -> tuple[str, ...]:
        """Of the paths whose refusals have this dialect's form."""

    def refusal(self, status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> Response:
        """The response to a request that reached no endpoint. `kind`: an error's type, as in core/errors."""

    def make_routes(self, context: Context) -> list[Route]: ...
