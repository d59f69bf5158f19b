"""A server whose model is one file: the demo model's, which generates what the demo model's folder does."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from tests.checkpoints import checkpoint_tensors, training_tensors, write_checkpoint
from tests.http.asking import draw, picture_of
from tests.http.servers import BENTOML, ROOT, Server, environment, free_port, serve
from tests.lora_files import ATTENTION, changes, save_as_kohya
from tests.tensor_files import write


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = checkpoint_tensors(StableDiffusionPipeline.from_pretrained(DEMO_FOLDER, dtype=torch.float16))
    file = write_checkpoint(tmp_path_factory.mktemp("models") / "shapes v1.0.safetensors", tensors | training_tensors(tensors))
    save_as_kohya(file.parent / "loras" / "outline.safetensors", changes(ATTENTION, seed=2))
    file.with_name("shapes v1.0.defaults.json").write_text('{"steps": 6, "scheduler": "DDIM"}')
    return file


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def of_file(request: pytest.FixtureRequest, file: Path) -> Iterator[Server]:
    changed = {"BENTOML_CONFIG": "configuration.yaml", "SD_MODEL": str(file)}
    with serve(ROOT / request.param, "service:svc", file.parent / f"home-{request.param}", changed) as started:
        yield started


def test_a_file_generates_what_its_folder_does_and_says_what_it_is(of_file: Server, server: Server) -> None:
    ours, theirs = draw(of_file, seed=5), draw(server, seed=5, scheduler="DDIM")
    assert (ours.headers["model"], theirs.headers["model"]) == ("shapes v1.0", "demo")
    assert picture_of(ours).tobytes() == picture_of(theirs).tobytes()
    with of_file.client() as client:
        status, can = client.get("/status").json(), client.get("/capabilities").json()
        (listed,) = client.get("/v1/models").json()["data"]
        (a1111,) = client.get("/sdapi/v1/sd-models").json()
    assert status["model"] == {"name": "shapes v1.0", "hash": check_model(DEMO_FOLDER).hash, "is_demo": False}
    assert [(runner["dtype"], runner["prediction_type"]) for runner in status["runners"]] == [("float32", "epsilon")]
    assert (can["fields"]["num_inference_steps"]["default"], can["default_scheduler"]) == (6, "DDIMScheduler")
    assert (listed["id"], a1111["model_name"]) == ("shapes v1.0", "shapes v1.0")
    assert str(DEMO_FOLDER.parent) not in str((status, can, listed, a1111)), "a path leaks"


def test_loras_lie_beside_the_file(of_file: Server) -> None:
    plain, changed = draw(of_file, seed=5), draw(of_file, seed=5, loras=[{"name": "outline"}])
    assert picture_of(plain).tobytes() != picture_of(changed).tobytes()
    with of_file.client() as client:
        assert [lora["name"] for lora in client.get("/capabilities").json()["loras"]] == ["outline"]


def test_a_file_that_is_no_model_ends_the_start_with_what_it_is(tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", {"lora_unet_a.lora_up.weight": (4, 4), "lora_unet_a.lora_down.weight": (4, 4)})
    finished = subprocess.run(
        [str(BENTOML), "serve", "service:svc", "--production", "--port", str(free_port())],
        cwd=ROOT / "fp32",
        env=environment(tmp_path, {"SD_MODEL": str(file), "BENTOML_CONFIG": "configuration.yaml"}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 1
    assert (
        f"Not started: SD_MODEL: {file}: it is a LoRA, not a whole model: put it into the folder loras; expected Stable" in finished.stderr
    )
    assert "Traceback" not in finished.stderr
