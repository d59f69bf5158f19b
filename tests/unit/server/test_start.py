"""All settings are checked before a server starts; an invalid one ends the start with a one-line message."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import pytest

from stable_diffusion.core.errors import ModelFolderError
from stable_diffusion.models.folder import DEMO_FOLDER, ModelFolder, check_model
from stable_diffusion.server.start import check_address, checked_model, warn_of_settings_without_effect

DEMO = check_model(DEMO_FOLDER)


def start(variables: dict[str, str]) -> ModelFolder:
    return checked_model(variables, lambda: DEMO, "127.0.0.1", in_bento=True)


def test_a_server_with_nothing_set_starts() -> None:
    assert start({}) == DEMO


@pytest.mark.parametrize("name", ["SD_LOG_PROMPTS", "SD_WITHOUT_KEYS"])
@pytest.mark.parametrize("value", ["true", "Off", ""])
def test_a_server_starts_with_every_spelling_of_on_and_off(name: str, value: str) -> None:
    assert start({name: value}) == DEMO


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "maybe") for name in ("SD_LOG_PROMPTS", "SD_EXECUTION", "SD_WITHOUT_KEYS", "SD_SAFETY", "SD_OPEN", "SD_RATE_LIMIT")),
        *((name, "maybe") for name in ("SD_MAX_QUEUE_S", "SD_MAX_QUEUE_PICTURES", "SD_STUCK_STEP_S", "SD_STOP_GRACE_S")),
        ("SD_CUDA_GRAPHS", "on"),
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


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1"])
def test_a_server_whose_port_is_in_use_does_not_start_and_says_what_to_do(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as other:
        port = other.getsockname()[1]
        with pytest.raises(SystemExit) as refused:
            check_address(host, port)
    assert str(refused.value) == (
        f"Not started: cannot listen on {host}, port {port}: Address already in use. "
        f"Another port: make serve PORT={port + 1}, or bentoml serve --port {port + 1}"
    )
    check_address(host, port)


def test_a_server_with_an_address_of_another_machine_does_not_start() -> None:
    with pytest.raises(SystemExit, match="^Not started: cannot listen on 192.0.2.1, port 3000: Cannot assign requested address"):
        check_address("192.0.2.1", 3000)


def test_a_port_whose_connections_have_just_ended_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()  # the side that closes first keeps the connection in TIME_WAIT
        client.close()
    check_address("127.0.0.1", port)


def test_a_variable_that_looks_like_a_setting_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "stable_diffusion"):
        warn_of_settings_without_effect({"SD_RATE_LIMT": "5", "SD_MODEL": "demo"})
    assert caplog.messages == ["SD_RATE_LIMT is not a setting of this server and has no effect. Is SD_RATE_LIMIT meant?"]


def test_a_folder_that_does_not_exist_is_warned_about(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embeddings").mkdir()
    with caplog.at_level(logging.WARNING, "stable_diffusion"):
        warn_of_settings_without_effect({"SD_LORAS": "loras", "SD_EMBEDDINGS": "embeddings"})
    assert caplog.messages == [f"SD_LORAS: {tmp_path}/loras: no such folder"]
