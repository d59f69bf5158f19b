"""Requests that the OpenAPI document allows, and many that it forbids, get responses as documented and never a 5xx."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from stable_diffusion.images.encode import encode
from tests.http.servers import ROOT, Server

SCHEMATHESIS = ROOT / ".venv" / "tools" / "bin" / "schemathesis"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
REQUEST_TIMEOUT_S = 60
# Images are small and have few steps, even if a field is left out; the rest of the document is as served.
SMALL = {"num_inference_steps": 2, "steps": 2, "width": 64, "height": 64, "n": 1, "batch_size": 1, "n_iter": 1}
GENERATING = (
    *("/txt2img", "/img2img", "/inpaint", "/reproduce", "/v1/images/generations", "/v1/images/edits"),
    *("/sdapi/v1/txt2img", "/sdapi/v1/img2img"),
)
INFOTEXT = "a red circle\nSteps: 2, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64, Denoising strength: 0.9, Kind: inpaint"
# Valid for every part: as the input image, as a mask with transparency, and as an image with an infotext.
IMAGE = encode(Image.merge("RGBA", [Image.linear_gradient("L").resize((64, 64))] * 4), "png", INFOTEXT)
# Read by schemathesis: most uploads are images. If a form has three, all must be images to generate one.
HOOKS = """
from pathlib import Path
import schemathesis
from hypothesis import strategies
schemathesis.openapi.format("binary", strategies.sampled_from([Path("picture.png").read_bytes()] * 7 + [b"no picture"]))
"""


def with_small_pictures(document: Any) -> Any:
    if isinstance(document, list):
        return [with_small_pictures(one) for one in document]
    if not isinstance(document, dict):
        return document
    changed = {name: with_small_pictures(value) for name, value in document.items()}
    if isinstance(changed.get("prompt"), str):  # an example
        changed |= {name: value for name, value in SMALL.items() if name in changed}
    if "prompt" in changed.get("properties", {}):
        _make_small(changed)
    if "picture" in changed.get("properties", {}):  # /reproduce: the image comes from inpainting, which needs the other two
        changed["required"] = ["picture", "img", "mask"]
    return changed


def _make_small(schema: dict[str, Any]) -> None:
    """Also what by itself would have nearly every request refused for the same reason."""
    properties = schema["properties"]
    if "num_inference_steps" in properties:
        for other_name in ("steps", "cfg_scale"):
            properties.pop(other_name, None)
    for name in [name for name, field in properties.items() if field.get("description", "").startswith("Ignored")]:
        properties.pop(name)
    small = SMALL.keys() & properties.keys()
    properties |= {name: {"type": "integer", "minimum": SMALL[name], "maximum": SMALL[name]} for name in small}
    picture = base64.b64encode(IMAGE).decode()
    allowed: dict[str, Any] = {
        "prompt": {"type": "string", "minLength": 1},
        "size": {"enum": ["auto", "64x64"]},
        "init_images": {"type": "array", "items": {"enum": [picture]}, "minItems": 1, "maxItems": 1},
        # The server has no LoRAs, and the demo model's text encoder has three layers.
        "loras": {"type": "string", "enum": ["", "[]"]} if properties.get("loras", {}).get("type") == "string" else {"enum": [[]]},
        "clip_skip": {"type": "integer", "minimum": 1, "maximum": 3},
        "mask": {"enum": [picture, None]} if "init_images" in properties else properties.get("mask"),
    }
    properties |= {name: value for name, value in allowed.items() if name in properties}
    schema["required"] = sorted({*schema.get("required", []), *small, *({"prompt", "init_images"} & properties.keys())})


def statuses_by_path(report: Path) -> dict[str, dict[int, int]]:
    """The number of responses by path and status."""
    counts: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for entry in json.loads(report.read_text())["log"]["entries"]:
        path = "/" + entry["request"]["url"].partition("://")[2].partition("/")[2].partition("?")[0]
        counts[path][entry["response"]["status"]] += 1
    return counts


def test_every_response_is_as_documented(server: Server, tmp_path: Path) -> None:
    with server.client() as client:
        document = with_small_pictures(client.get("/docs.json").json())
    (tmp_path / "docs.json").write_text(json.dumps(document))
    (tmp_path / "picture.png").write_bytes(IMAGE)
    (tmp_path / "hooks.py").write_text(HOOKS)
    run = [
        *(str(SCHEMATHESIS), "run", "docs.json", "--url", server.url, "--checks", CHECKS, "--seed", "1", "--exclude-path", "/metrics"),
        *("--no-shrink", "--continue-on-failure", "--request-timeout", str(REQUEST_TIMEOUT_S), "--warnings", "off"),
        *("--suppress-health-check", "all"),
    ]
    right = [
        *run,
        "--phases",
        "fuzzing",
        "--mode",
        "positive",
        "--max-examples",
        "30",
        "--report",
        "har",
        "--report-har-path",
        "report.har",
    ]
    wrong = [*run, "--phases", "fuzzing", "--mode", "negative", "--max-examples", "30"]
    # Every limit of every field, one at a time; for the generating operations that would take a thousand images.
    systematic = [*run, "--phases", "coverage", *(part for path in GENERATING for part in ("--exclude-path", path))]
    variables = os.environ | {"SCHEMATHESIS_HOOKS": "./hooks.py"}

    def run_it(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300, check=False)

    with ThreadPoolExecutor() as threads:
        for finished in threads.map(run_it, (right, wrong, systematic)):
            assert finished.returncode == 0, finished.stdout[-20_000:] + finished.stderr
    statuses = statuses_by_path(tmp_path / "report.har")
    successes = {path: sum(count for status, count in statuses[path].items() if status < 300) for path in GENERATING}
    print("statuses:", {path: dict(statuses[path]) for path in GENERATING})
    assert all(successes.values()), successes
