"""The API packages whose errors have a form of their own: their interface, and which of them a path belongs to."""

from __future__ import annotations

from typing import Any, Protocol

from starlette.responses import Response
from starlette.routing import Route

from stable_diffusion.api import a1111, openai
from stable_diffusion.api.context import Context


class Dialect(Protocol):
    """The names that such a package exports as a module."""

    @property
    def PREFIXES(self) -> tuple[str, ...]:
        """The prefixes of the paths whose refusals have this dialect's form."""

    @property
    def ERROR(self) -> Any:
        """The type of the JSON in this dialect's errors."""

    def refusal(self, status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> Response:
        """The response to a request that did not reach an endpoint. `kind`: an error type, as in core/errors."""

    def make_routes(self, context: Context) -> list[Route]: ...


_DIALECTS: tuple[Dialect, ...] = (openai, a1111)


def dialect_of(path: str) -> Dialect | None:
    """The package to which a path belongs; None if its errors have the native form."""
    return next((one for one in _DIALECTS if path.startswith(one.PREFIXES)), None)
