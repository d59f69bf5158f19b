"""The pages for browsers: Swagger at /, and the page at /ui, whose files are plain HTML, CSS and ES modules.

`PAGE` and `PAGE_HEADERS` belong to Swagger; the rest of the module serves the files of /ui.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

PAGE_ASSETS = ("swagger-ui.css", "swagger-ui-bundle.js")
_STYLE = "body > p { max-width: 1420px; margin: 1rem auto 0; padding: 0 20px; font: 1rem sans-serif }"
_SCRIPT = """
      window.ui = SwaggerUIBundle({
        url: "./docs.json",
        dom_id: "#swagger-ui",
        deepLinking: true,
        tryItOutEnabled: true,
        validatorUrl: null,
        docExpansion: "list",
        defaultModelsExpandDepth: 0,
        presets: [SwaggerUIBundle.presets.apis]
      });
    """
# BentoML's own page loads Google Tag Manager in the visitor's browser. This page loads only the assets that BentoML ships.
PAGE = f"""<!DOCTYPE html>
<html lang="en">
  <head>
    <meta charset="utf-8">
    <meta name="viewport" content="width=device-width, initial-scale=1">
    <title>Stable Diffusion</title>
    <link rel="icon" href="data:,">
    <link rel="stylesheet" href="./static_content/swagger-ui.css">
    <style>{_STYLE}</style>
  </head>
  <body>
    <p><a href="./ui/">Generate images in the browser</a></p>
    <div id="swagger-ui"></div>
    <script src="./static_content/swagger-ui-bundle.js"></script>
    <script>{_SCRIPT}</script>
  </body>
</html>
"""


def _source(inline: str) -> str:
    """The source expression that allows an inline script or style in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"


PAGE_HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'self'",
            f"script-src 'self' {_source(_SCRIPT)}",
            f"style-src 'self' {_source(_STYLE)}",
            "img-src 'self' blob: data:",  # generated images, and Swagger's own icons
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "Referrer-Policy": "no-referrer",
}

_FOLDER = Path(__file__).parents[1] / "ui"
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' blob: data:",  # images arrive in server-sent events and are shown from memory
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Cache-Control": "no-cache",  # cached, but revalidated: the server may have been updated
    "Content-Security-Policy": _CONTENT_SECURITY_POLICY,
    "Referrer-Policy": "no-referrer",
}


def routes() -> list[Route]:
    """Routes for /ui/ and each of its files. /ui redirects to /ui/, because the page's links are relative to that."""
    files = sorted(file for file in _FOLDER.iterdir() if file.suffix in _MEDIA_TYPES)
    return [Route("/ui", _to_the_page), *(_route(file) for file in files)]


async def _to_the_page(request: Request) -> Response:
    return RedirectResponse("ui/", 308)  # relative, so that it works behind a proxy that adds a prefix


def _route(file: Path) -> Route:
    content = file.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "ETag": tag}

    async def send(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=_MEDIA_TYPES[file.suffix], headers=headers)

    return Route("/ui/" if file.name == "index.html" else f"/ui/{file.name}", send)
