"""The interface of an API package whose errors have a form of their own: its routes, its path prefixes, its refusals."""

from __future__ import annotations

from typing import Protocol

from starlette.responses import Response
from starlette.routing import Route

from stable_diffusion.api.context import Context


class Dialect(Protocol):
    """The names that such a package exports as a module."""

    @property
    def PREFIXES(self) -> tuple[str, ...]:
        """The prefixes of the paths whose refusals have this dialect's form."""

    def refusal(self, status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> Response:
        """The response to a request that did not reach an endpoint. `kind`: an error type, as in core/errors."""

    def make_routes(self, context: Context) -> list[Route]: ...
