"""What a model generates with where a request says nothing: its defaults.json, and what its configuration shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stable_diffusion.core.errors import ModelFolderError
from stable_diffusion.models.defaults import Defaults
from stable_diffusion.models.folder import DEMO_FOLDER, check_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO_FOLDER, tmp_path / "model"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def state(folder: Path, **values: Any) -> None:
    (folder / "defaults.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("unet", "scheduler", "steps", "guidance_scale"),
    [
        ({}, {}, 50, 7.5),
        ({}, {"_class_name": "LCMScheduler"}, 4, 1.0),
        ({"time_cond_proj_dim": 256}, {"_class_name": "LCMScheduler"}, 4, 8.5),
        ({"time_cond_proj_dim": 256}, {}, 4, 8.5),
        ({}, {"timestep_spacing": "trailing"}, 4, 0.0),  # sd-turbo
        ({}, {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}, 50, 7.5),
        ({}, {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, 50, 7.5),
        ({}, {"timestep_spacing": "trailing", "rescale_betas_zero_snr": False}, 4, 0.0),
    ],
)
def test_three_signs_of_few_steps_are_known(
    folder: Path, unet: dict[str, Any], scheduler: dict[str, Any], steps: int, guidance_scale: float
) -> None:
    change(folder / "unet" / "config.json", **unet)
    change(folder / "scheduler" / "scheduler_config.json", **scheduler)
    assert check_model(folder).defaults == Defaults(steps, guidance_scale, (0.0, 30.0))


def test_a_models_name_is_no_sign(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO_FOLDER, tmp_path / "sd-turbo-lcm-lightning"))
    assert check_model(folder).defaults == Defaults(50, 7.5)


def test_the_file_says_everything(folder: Path) -> None:
    state(folder, steps=6, guidance_scale=1.5, guidance_scale_range=[1, 2], scheduler="dpm++_2m_karras", width=96, height=72)
    model = check_model(folder)
    assert model.defaults == Defaults(6, 1.5, (1.0, 2.0))
    assert model.scheduler == "DPMSolverMultistepScheduler Karras"
    assert (model.native_width, model.native_height) == (96, 72)


def test_what_the_file_leaves_open_is_what_the_configuration_shows(folder: Path) -> None:
    state(folder)
    assert check_model(folder).defaults == Defaults(50, 7.5)
    state(folder, scheduler="LCM")
    assert (check_model(folder).scheduler, check_model(folder).defaults) == ("LCMScheduler", Defaults(4, 1.0))
    state(folder, guidance_scale_range=[0, 2], width=96)
    model = check_model(folder)
    assert model.defaults == Defaults(50, 2.0, (0.0, 2.0)), "the usual guidance scale would be refused"
    assert (model.native_width, model.native_height) == (96, 64)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"steps": 0}, "steps: must be greater than or equal to 1"),
        ({"steps": "4"}, "steps: must be a valid integer"),
        ({"num_inference_steps": 4}, "num_inference_steps: is not a known field, allowed are steps, guidance_scale, guidance_scale_range"),
        ({"guidance_scale": 31}, "guidance_scale: must be less than or equal to 30"),
        ({"guidance_scale_range": [0]}, "guidance_scale_range: "),
        ({"guidance_scale_range": [0, 31]}, "guidance_scale_range: must be less than or equal to 30"),
        ({"guidance_scale_range": [2, 1]}, "guidance_scale_range: the first value must not exceed the second, got 2 and 1"),
        ({"guidance_scale_range": [0, 2], "guidance_scale": 3}, "guidance_scale: must be in the guidance_scale_range, 0 to 2"),
        ({"scheduler": "Magic"}, "scheduler: unknown scheduler 'Magic', allowed are PNDM"),
        ({"width": 100}, "width: must be a multiple of 8"),
        ({"height": 2056}, "height: must be less than or equal to 2048"),
    ],
    ids=str,
)
def test_what_is_wrong_in_the_file_is_named(folder: Path, values: dict[str, Any], told: str) -> None:
    state(folder, **values)
    with pytest.raises(ModelFolderError) as caught:
        check_model(folder)
    assert str(caught.value).startswith(f"{folder / 'defaults.json'}: {told}")


@pytest.mark.parametrize("content", ["[]", "{", '{"steps": NaN}'])
def test_a_file_that_is_no_json_object_is_named(folder: Path, content: str) -> None:
    (folder / "defaults.json").write_text(content)
    with pytest.raises(ModelFolderError, match=r"defaults\.json: "):
        check_model(folder)


def test_the_defaults_do_not_change_the_hash(folder: Path) -> None:
    before = check_model(folder).hash
    state(folder, steps=4, scheduler="LCM")
    assert check_model(folder).hash == before
