"""All settings are checked before a server starts; an invalid one ends the start with a one-line message."""

from __future__ import annotations

import pytest

from stable_diffusion.core.errors import ModelFolderError
from stable_diffusion.models.folder import DEMO_FOLDER, ModelFolder, check_model
from stable_diffusion.server.start import checked_model

DEMO = check_model(DEMO_FOLDER)


def start(variables: dict[str, str]) -> ModelFolder:
    return checked_model(variables, lambda: DEMO, "127.0.0.1", in_bento=True)


def test_a_server_with_nothing_set_starts() -> None:
    assert start({}) == DEMO


@pytest.mark.parametrize("name", ["SD_LOG_PROMPTS", "SD_CUDA_GRAPHS", "SD_WITHOUT_KEYS"])
@pytest.mark.parametrize("value", ["true", "Off", ""])
def test_a_server_starts_with_every_spelling_of_on_and_off(name: str, value: str) -> None:
    assert start({name: value}) == DEMO


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "maybe") for name in ("SD_LOG_PROMPTS", "SD_CUDA_GRAPHS", "SD_WITHOUT_KEYS", "SD_SAFETY", "SD_OPEN", "SD_RATE_LIMIT")),
        *((name, "maybe") for name in ("SD_MAX_QUEUE_S", "SD_MAX_QUEUE_PICTURES", "SD_STUCK_STEP_S", "SD_STOP_GRACE_S")),
        ("SD_SAFETY", "always"),
        ("SD_SHARED_STATE", "redis://192.0.2.1"),
        ("SD_SHARED_STATE", "redis://127.0.0.1:1"),
        ("SD_API_KEYS", "short"),
        ("SD_API_KEYS_FILE", "/there/is/none"),
    ],
)
def test_a_server_with_an_invalid_setting_does_not_start_and_names_the_variable(name: str, value: str) -> None:
    with pytest.raises(SystemExit, match=rf"^Not started: {name}\b.*$"):
        start({name: value})


def test_a_bento_that_would_be_open_by_accident_does_not_start() -> None:
    with pytest.raises(SystemExit, match="^Not started: no API key is set, and everyone who reaches 0.0.0.0 could generate images"):
        checked_model({}, lambda: DEMO, "0.0.0.0", in_bento=True)
    assert checked_model({"SD_WITHOUT_KEYS": "yes"}, lambda: DEMO, "0.0.0.0", in_bento=True) == DEMO


def test_a_server_without_a_complete_model_does_not_start() -> None:
    def no_model() -> ModelFolder:
        raise ModelFolderError("there is none")

    with pytest.raises(SystemExit, match="^Not started: there is none$"):
        checked_model({}, no_model, "127.0.0.1", in_bento=False)
