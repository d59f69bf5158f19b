"""The service as a user starts it, on this machine's device: both precisions, and a failing device.

Knows HTTP only, and the pixel rule that judges the demo model's images.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
from PIL import Image

from benchmarks.gpu.checks import Checks, Finding
from benchmarks.report import machine
from stable_diffusion.demo.shapes import judge
from tests import faults
from tests.http.servers import PLAIN_HTTP, ROOT, Server, serve

PROMPT = "a large red circle on a blue background"
_READY_AGAIN_S = 90


def service(precision: str) -> Finding:
    """txt2img, img2img and inpaint over HTTP."""
    with tempfile.TemporaryDirectory() as home:
        began = time.perf_counter()
        with serve(ROOT / precision, "service:svc", Path(home), {"XDG_CACHE_HOME": home}) as server, server.client() as client:
            ready_s = time.perf_counter() - began
            status = client.get("/status").json()
            images = [_generate(client, kind) for kind in ("txt2img", "img2img", "inpaint")]
            spent: list[float] = []
            for _ in range(5):
                began = time.perf_counter()
                _generate(client, "txt2img")
                spent.append(time.perf_counter() - began)
    verdict = judge(images[0])
    passed = (verdict.colour, verdict.background) == ("red", "blue") and len({image.size for image in images}) == 1
    runner = status["runners"][0]
    return Finding(
        passed,
        f"ready after {ready_s:.1f} s on {runner['device']} as {runner['dtype']}; "
        f"generated: a {verdict.colour} {verdict.shape} on {verdict.background}; 20 steps in {min(spent):.2f} s over HTTP; "
        f"batch limit: {runner['caps'][0]['reason']}",
    )


def _generate(client: httpx.Client, kind: str) -> Image.Image:
    fields = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 20, "guidance_scale": 4}
    if kind == "txt2img":
        response = client.post("/txt2img", json=fields, headers={"Accept": "image/png"})
    else:
        files = {"img": ("input.png", _png(Image.new("RGB", (64, 64), (40, 160, 70))))}
        if kind == "inpaint":
            files["mask"] = ("mask.png", _png(Image.new("L", (64, 64), 255)))
        response = client.post(f"/{kind}", files=files, data={"data": json.dumps(fields)}, headers={"Accept": "image/png"})
    response.raise_for_status()
    return Image.open(io.BytesIO(response.content)).convert("RGB")


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def failing_device() -> Finding:
    """A kernel fails on the device: the request gets 503, the model process restarts, and the server generates again."""
    variables = {"PYTHONPATH": str(ROOT), "BENTOML_CONFIG": str(ROOT / "fp32" / "configuration.yaml")}
    with tempfile.TemporaryDirectory() as home:
        folder = ROOT / "tests" / "http" / "faulty"
        with serve(folder, "service:svc", Path(home), {**_with_path(variables), "XDG_CACHE_HOME": home}) as server:
            with server.client() as client:
                refused = client.post("/txt2img", json={"prompt": faults.DEVICE_FAILS, "num_inference_steps": 4})
            again_s = _seconds_until_ready(server)
            with server.client() as client:
                following = client.post("/txt2img", json={"prompt": PROMPT, "num_inference_steps": 4})
            said = [line.strip() for line in server.log.splitlines() if "Error: CUDA error" in line]
    passed = refused.status_code == 503 and following.status_code == 200
    detail = f"the request got {refused.status_code}, the next one after {again_s:.1f} s {following.status_code}; "
    return Finding(passed, detail + (said[-1] if said else "no CUDA error in the log"))


def _with_path(variables: dict[str, str]) -> dict[str, str]:
    """The variables with this process's module search path."""
    paths = [variables["PYTHONPATH"], *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**variables, "PYTHONPATH": os.pathsep.join(paths)}


def _seconds_until_ready(server: Server) -> float:
    began = time.monotonic()
    was_away = False
    while time.monotonic() - began < _READY_AGAIN_S:
        ready = httpx.get(f"{server.url}/readyz", timeout=10, **PLAIN_HTTP).status_code == 200
        was_away = was_away or not ready
        if ready and was_away:
            return time.monotonic() - began
        time.sleep(0.1)
    raise TimeoutError(f"not ready again after {_READY_AGAIN_S} s; was away: {was_away}")


CHECKS: dict[str, Callable[[], Finding]] = {
    "fp16 over HTTP": partial(service, "fp16"),
    "fp32 over HTTP": partial(service, "fp32"),
    "the device fails": failing_device,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--name", required=True, help="name of the output files")
    parser.add_argument("--output", type=Path, required=True, help="an existing folder")
    arguments = parser.parse_args()
    # As after Ctrl+C, so that no server is left running.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    checks = Checks(arguments.output, arguments.name, {**machine(), "model": "demo"})
    for name in arguments.checks:
        checks.make(name, CHECKS[name])


if __name__ == "__main__":
    main()
