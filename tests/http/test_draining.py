"""SIGTERM to a server that is drawing: its pictures are finished and can be fetched, nothing new is taken, it ends with status 0."""

from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.http.servers import PLAIN_HTTP, ROOT, serve, wait_until_drawing


def test_a_stopped_server_finishes_its_picture_and_refuses_new_ones(tmp_path: Path) -> None:
    with (
        serve(ROOT / "fp32", "service:svc", tmp_path, {"SD_MODEL": "demo"}) as server,
        server.client() as client,
        ThreadPoolExecutor() as threads,
    ):
        slow = {"prompt": "a red circle", "num_inference_steps": 30, "height": 256, "width": 256}
        last = threads.submit(client.post, "/txt2img", json=slow)
        with server.client() as watching:
            asynchronous = watching.post(
                "/txt2img", json={"prompt": "a red circle", "num_inference_steps": 60, "seed": 3}, headers={"Prefer": "respond-async"}
            )
            wait_until_drawing(watching, poll_s=0.05)
        time.sleep(0.5)  # from the API worker to the runner it takes milliseconds
        server.process.terminate()
        time.sleep(1)
        with server.client() as late:
            refused = late.post("/txt2img", json={"prompt": "a red circle"})
            assert (refused.status_code, refused.json()["error"]["type"]) == (503, "shutting_down")
            assert refused.headers["connection"] == "close"
            assert late.get("/readyz").status_code == 503
            assert late.get("/livez").status_code == 200
        assert not last.done(), "the picture was done too soon to prove anything"
        with server.client() as asking:
            while (job := asking.get(asynchronous.headers["location"]).json())["state"] in ("queued", "running"):
                time.sleep(0.1)
            time.sleep(1)
            fetched = asking.get(job["picture"])
        assert (fetched.status_code, fetched.headers["seed"]) == (200, "3")
        picture = last.result(60)
        assert picture.status_code == 200
        assert Image.open(io.BytesIO(picture.content)).size == (256, 256)
        assert server.process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url, **PLAIN_HTTP)
