"""A visit to the page at /ui: Debian's Chromium, driven by Playwright, against a started server."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from playwright.sync_api import BrowserContext, ConsoleMessage, Locator, Page, Request, expect

from tests.http.servers import Server


@dataclass
class Visit:
    """A page in a new browser profile, with a record of its requests and console messages."""

    server: Server
    context: BrowserContext
    page: Page
    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def begin(self) -> None:
        self.page.on("request", self._note_request)
        self.page.on("console", self._note_console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.open()

    def open(self) -> None:
        self.page.goto(f"{self.server.url}/ui")
        expect(self.draw).to_be_enabled()

    def _note_request(self, request: Request) -> None:
        self.asked.append(request.url)

    def _note_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def control(self, name: str) -> Locator:
        return self.page.locator(f"#{name}")

    @property
    def draw(self) -> Locator:
        return self.control("draw")

    def fill(self, **values: object) -> None:
        for name, value in values.items():
            self.control(name).fill(str(value))

    def pictures(self, count: int = 1) -> list[Image.Image]:
        """The decoded images, once all of them are shown."""
        expect(self.page.locator("#cards figcaption")).to_have_count(count, timeout=60_000)
        expect(self.draw).to_be_visible()
        shown = self.page.locator("#cards img").all()
        return [decoded(image) for image in shown]


def body_of(request: Request) -> dict[str, Any]:
    """The JSON that a request carries."""
    body = request.post_data_json
    assert isinstance(body, dict)
    return body


def decoded(image: Locator) -> Image.Image:
    """The pixels that an <img> shows."""
    url = image.evaluate(
        """async (image) => {
             await image.decode();
             const canvas = document.createElement("canvas");
             [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
             canvas.getContext("2d").drawImage(image, 0, 0);
             return canvas.toDataURL("image/png");
           }"""
    )
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
