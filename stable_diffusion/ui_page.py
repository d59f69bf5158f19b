"""The page at /ui/: the files of `ui/` as they are, with headers under which it loads and shows nothing from elsewhere.

Knows nothing of what the page does; in the browser it is a client of the plain endpoints like any other.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

_FOLDER = Path(__file__).parent / "ui"
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' blob: data:",  # pictures come in events and are shown from memory
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Cache-Control": "no-cache",  # kept, but asked for again: another version of the server may run by then
    "Content-Security-Policy": _CONTENT_SECURITY_POLICY,
    "Referrer-Policy": "no-referrer",
}


def routes() -> list[Route]:
    """/ui/ and each of its files by name; /ui leads to /ui/, since what the page names is relative to that."""
    files = sorted(file for file in _FOLDER.iterdir() if file.suffix in _MEDIA_TYPES)
    return [Route("/ui", _to_the_page), *(_route(file) for file in files)]


async def _to_the_page(request: Request) -> Response:
    return RedirectResponse("ui/", 308)  # relative, so that it is right behind a proxy that adds a prefix


def _route(file: Path) -> Route:
    content = file.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "ETag": tag}

    async def send(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=_MEDIA_TYPES[file.suffix], headers=headers)

    return Route("/ui/" if file.name == "index.html" else f"/ui/{file.name}", send)
