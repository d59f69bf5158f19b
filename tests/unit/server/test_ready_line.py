"""The line that says that the server is ready comes once, when /readyz says so."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from stable_diffusion.server import ready_line
from stable_diffusion.server.ready_line import say_when_ready
from stable_diffusion.state.runner_status import RunnerState, StepBatchLimit


class Page(BaseHTTPRequestHandler):
    """Not ready as often as `statuses` says, and without an answer for 0; then ready."""

    statuses: list[int]
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if status := self.statuses.pop(0) if self.statuses else 200:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setenv("SD_SHARED_FOLDER", str(tmp_path / "shared"))
    monkeypatch.setattr(ready_line, "_ASK_INTERVAL_S", 0.01)
    Page.statuses, Page.asked = [503, 0, 503], []
    with HTTPServer(("127.0.0.1", 0), Page) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.01,))
        serving.start()
        yield server.server_port
        server.shutdown()
        serving.join()


def said(caplog: pytest.LogCaptureFixture, host: str, port: int) -> list[str]:
    caplog.set_level(logging.INFO, "stable_diffusion")
    say_when_ready(host, port, "demo")
    deadline = time.monotonic() + 20
    while not caplog.messages:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)
    return caplog.messages


def test_it_names_the_address_the_model_and_the_batch_limit(port: int, caplog: pytest.LogCaptureFixture) -> None:
    state = RunnerState(1, "fp32", "demo")
    state.enter("ready")
    state.set_batch_limit(StepBatchLimit(64, 64, 8, "measured"))
    state.set_batch_limit(StepBatchLimit(128, 128, 2, "2 images did not fit"))
    assert said(caplog, "127.0.0.1", port) == [f"Ready: http://127.0.0.1:{port}, model demo, batch limit 8 at 64x64."]
    assert Page.asked == ["/readyz"] * 4


def test_a_server_at_all_addresses_is_asked_at_loopback(port: int, caplog: pytest.LogCaptureFixture) -> None:
    assert said(caplog, "0.0.0.0", port) == [f"Ready: http://0.0.0.0:{port}, model demo."], "no model process has said its batch limit"
