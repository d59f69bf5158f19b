"""Brings the request target into one form, before anything looks at the path: a path with single slashes and none at its end.

So keys, rate limits, routes, metrics and the log see the same path, however it is written. Does not know which paths exist.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from urllib.parse import unquote

from starlette.types import ASGIApp, Receive, Scope, Send

# http://HOST/PATH. A host with user and password is not accepted: RFC 9110, 4.2.4 has it treated as an error.
_ABSOLUTE_FORM = re.compile(rb"https?://([^/?#@\\\s]+)(/[^#]*)?", re.IGNORECASE)


class OnePath:
    """Shows inner applications the path that is meant, whose slashes may be doubled, or end it, or follow a host.

    uvicorn passes the absolute form (RFC 9112, 3.2.2) on as if it were a path: https://github.com/Kludex/uvicorn/pull/3097.
    `with_slash` are the paths that end with a slash.
    """

    def __init__(self, app: ASGIApp, with_slash: Collection[str]) -> None:
        self._app = app
        self._with_slash = frozenset(with_slash)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(self._in_one_form(scope) if scope["type"] == "http" else scope, receive, send)

    def _in_one_form(self, scope: Scope) -> Scope:
        path, headers = scope["path"], scope["headers"]
        # Of what was sent: a path in which http%3A//HOST/ is decoded is none.
        if absolute := _ABSOLUTE_FORM.fullmatch(scope["raw_path"]):
            path = unquote((absolute[2] or b"/").decode("ascii"))
            # The RFC says that this host counts, whatever Host says: nothing behind this line sees another one.
            headers = [(b"host", absolute[1]), *((name, value) for name, value in headers if name != b"host")]
        path = normal_path(path, self._with_slash)
        return {**scope, "path": path, "raw_path": path.encode(), "headers": headers}


def normal_path(path: str, with_slash: Collection[str] = ()) -> str:
    """The path with single slashes and none at its end, unless it is "/" or one of `with_slash`. What is no path stays as it is."""
    if not path.startswith("/"):
        return path
    single = re.sub("/{2,}", "/", path)
    return single if single in with_slash else single.rstrip("/") or "/"
