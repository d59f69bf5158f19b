"""The bentos of both folders: complete, served from another store, and never with the demo model by accident.

From the store that it was built into, the one of fp32 is served in `test_balancer.py`.
"""

from __future__ import annotations

import io
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from stable_diffusion.demo.shapes import judge
from tests.http.servers import BENTOML, ROOT, build_bento, environment, only_code, serve


@dataclass(frozen=True)
class BuiltBento:
    precision: str
    tag: str
    home: Path
    path: Path


def bentoml(home: Path, *arguments: str) -> str:
    finished = subprocess.run(
        [str(BENTOML), *arguments], cwd=home, env=environment(home), capture_output=True, text=True, timeout=180, check=False
    )
    assert finished.returncode == 0, finished.stderr + finished.stdout
    return finished.stdout.strip()


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def bento(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BuiltBento:
    precision = request.param
    home = tmp_path_factory.mktemp(f"store-{precision}")
    path = build_bento(ROOT / precision, home)
    return BuiltBento(precision, f"stable_diffusion_{precision}:latest", home, path)


def test_the_bento_contains_every_module_and_the_demo_model_as_real_files(bento: BuiltBento) -> None:
    source = bento.path / "src"
    tracked = subprocess.run(["git", "ls-files", "stable_diffusion"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert len(tracked) > 20
    missing = [name for name in tracked if not (source / name).is_file()]
    assert missing == []
    assert all((source / name).read_bytes() == (ROOT / name).read_bytes() for name in tracked)
    assert not [file for file in source.rglob("*") if file.is_symlink() or file.name == "__pycache__"]
    assert (source / "service.py").is_file()
    assert (source / "configuration.yaml").is_file()


def test_the_bento_installs_exactly_the_locked_set(bento: BuiltBento) -> None:
    locked = [line for line in (ROOT / "requirements-runtime.lock").read_text().splitlines() if line and not line.startswith("#")]
    required = (bento.path / "env" / "python" / "requirements.txt").read_text()
    for line in locked:
        requirement = line.partition(" ;")[0].strip()
        assert requirement in required, requirement


def test_the_image_sends_no_usage_reports_and_reads_the_configuration(bento: BuiltBento) -> None:
    dockerfile = (bento.path / "env" / "docker" / "Dockerfile").read_text()
    assert "BENTOML_DO_NOT_TRACK=True" in dockerfile
    assert "BENTOML_CONFIG=src/configuration.yaml" in dockerfile


def test_large_layers_come_before_layers_that_change_often(bento: BuiltBento) -> None:
    dockerfile = (bento.path / "env" / "docker" / "Dockerfile").read_text()
    order = ["FROM python:3.11-slim", "env/python/install.sh", "./src/model[s]", "./src/stable_diffusion/demo/model", "tar --create"]
    places = [dockerfile.index(text) for text in [*order, "HEALTHCHECK", "USER bentoml", 'ENTRYPOINT ["']]
    assert places == sorted(places)
    assert "COPY --chown=bentoml:bentoml . " not in dockerfile


def test_a_bento_without_weights_does_not_start_and_explains_why(bento: BuiltBento) -> None:
    finished = subprocess.run(
        [str(BENTOML), "serve", bento.tag, "--production", "--port", "0"],
        cwd=bento.home,
        env=environment(bento.home),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 1
    assert "Not started: this bento holds no weights" in finished.stderr
    assert "SD_MODEL=demo" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("variables", [{}, {"BENTOML_HOST": "192.0.2.1"}])
def test_a_bento_without_keys_does_not_start_on_a_reachable_address(bento: BuiltBento, variables: dict[str, str]) -> None:
    finished = subprocess.run(
        [str(BENTOML), "serve", bento.tag, "--production", "--port", "0"],
        cwd=bento.home,
        env=environment(bento.home, {"SD_MODEL": "demo", **variables}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 1
    host = variables.get("BENTOML_HOST", "0.0.0.0")
    assert f"Not started: no API key is set, and everyone who reaches {host} could generate images. Set SD_API_KEYS or" in finished.stderr
    assert "set SD_WITHOUT_KEYS=1 to start without keys" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_whatever_lies_in_models_is_in_the_bento_but_what_is_half_downloaded(bento: BuiltBento, tmp_path: Path) -> None:
    folder = tmp_path / bento.precision
    shutil.copytree(ROOT / bento.precision, folder, ignore=only_code)
    for name in ("requirements-runtime.lock", "Dockerfile.template"):
        shutil.copy(ROOT / name, tmp_path)
    names = [
        "xl/LICENSE.md",
        "xl/unet/config.json",
        "xl/unet/model.safetensors",
        "loras/glow.safetensors",
        "x.safetensors",
        "x.source.json",
    ]
    for name in [*names, "y.safetensors.part", "xl/vae/model.safetensors.part"]:
        (folder / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "models" / name).write_text(name)
    packed = build_bento(folder, bento.home) / "src" / "models"
    found = [str(file.relative_to(packed)) for file in packed.rglob("*") if file.is_file() and not file.name.startswith(".")]
    assert sorted(found) == sorted(names)


def test_an_exported_bento_is_served_from_another_store(bento: BuiltBento, tmp_path: Path) -> None:
    exported = tmp_path / "carried.bento"
    bentoml(bento.home, "export", bento.tag, str(exported))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    bentoml(elsewhere, "import", str(exported))
    with serve(elsewhere, bento.tag, elsewhere, {"SD_MODEL": "demo"}) as server, server.client() as client:
        response = client.post("/txt2img", json={"prompt": "a large green square on a white background", "seed": 1})
        assert response.headers["model"] == "demo"
        verdict = judge(Image.open(io.BytesIO(response.content)).convert("RGB"))
    assert (verdict.colour, verdict.background) == ("green", "white")
