"""Whatever the served OpenAPI document allows, and much that it does not, is answered as the document says, and never with a 5xx."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.service.servers import ROOT, Server

SCHEMATHESIS = ROOT / ".venv" / "tools" / "bin" / "schemathesis"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
# A picture that was asked for by chance may be large: it is not waited for.
REQUEST_TIMEOUT_S = 20
# What is drawn is small and has few steps; the rest of the document is as it is served.
SMALL = {"num_inference_steps": 1, "steps": 1, "width": 64, "height": 64, "n": 1, "batch_size": 1, "n_iter": 1}


def with_small_pictures(document: Any) -> Any:
    if isinstance(document, list):
        return [with_small_pictures(one) for one in document]
    if not isinstance(document, dict):
        return document
    changed = {name: with_small_pictures(value) for name, value in document.items()}
    for name, most in SMALL.items():
        if isinstance(field := changed.get("properties", {}).get(name), dict):
            for branch in [field, *field.get("anyOf", [])]:
                if "maximum" in branch:
                    branch["maximum"] = most
    return changed


def test_no_request_is_answered_otherwise_than_documented(fp32_server: Server, tmp_path: Path) -> None:
    with fp32_server.client() as client:
        document = with_small_pictures(client.get("/docs.json").json())
        (tmp_path / "docs.json").write_text(json.dumps(document))
    command = [
        *(str(SCHEMATHESIS), "run", str(tmp_path / "docs.json"), "--url", fp32_server.url, "--checks", CHECKS),
        *("--phases", "coverage,fuzzing", "--max-examples", "5", "--seed", "1", "--no-shrink", "--continue-on-failure"),
        *("--request-timeout", str(REQUEST_TIMEOUT_S), "--warnings", "off", "--suppress-health-check", "all"),
        *("--exclude-path", "/metrics"),
    ]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert finished.returncode == 0, finished.stdout[-20_000:] + finished.stderr
