"""What the safety checker says reaches the client."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from tests.safety_checkers import make_checked_model
from tests.service.servers import ROOT, serve


def test_a_flagged_picture_is_blank_and_a_header_says_so(tmp_path: Path) -> None:
    folder = make_checked_model(tmp_path / "strict", flags_everything=True)
    request = {"prompt": "a red circle", "num_inference_steps": 4, "output_format": "png"}
    with serve(ROOT / "fp32", "service:svc", tmp_path / "home", {"SD_MODEL": str(folder)}) as server, server.client() as client:
        flagged = client.post("/txt2img", json=request)
        unchecked = client.post("/txt2img", json=request | {"safety_check": False})
        again = client.post("/txt2img", json=request)
        both = client.post("/v1/images/generations", json=request | {"n": 2}).json()["data"]
    assert [answer.headers["safety_flagged"] for answer in (flagged, unchecked, again)] == ["true", "unchecked", "true"]
    assert Image.open(io.BytesIO(flagged.content)).convert("L").getextrema() == (0, 0)
    assert Image.open(io.BytesIO(unchecked.content)).convert("L").getextrema() != (0, 0)
    assert flagged.headers["model"] == "strict"
    # OpenAI's API: the blank pictures keep their places.
    assert [one["safety_flagged"] for one in both] == [True, True]
    assert Image.open(io.BytesIO(base64.b64decode(both[0]["b64_json"]))).convert("L").getextrema() == (0, 0)
