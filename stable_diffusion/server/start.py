"""Checks all settings and the model before any process starts.

So a wrong setting gives one clear message, not a series of crashing workers. Does not depend on BentoML.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from stable_diffusion.core.errors import ModelFolderError, SettingError
from stable_diffusion.core.settings import EMBEDDINGS_VARIABLE, LORAS_VARIABLE, read_settings, safety_policy, unknown_variables
from stable_diffusion.models.folder import ModelFolder
from stable_diffusion.server.access.policy import check_exposure, read_access
from stable_diffusion.state.shared_state import check_shared_state

logger = logging.getLogger("stable_diffusion")


def check_address(host: str, port: int) -> None:
    """Check that the server can listen at this IP address and TCP port. Raises SystemExit with the reason if it cannot."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as BentoML's: a server that has just ended is no obstacle
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SystemExit(
                f"Not started: cannot listen on {host}, port {port}: {error.strerror}. "
                f"Another port: make serve PORT={port + 1}, or bentoml serve --port {port + 1}"
            ) from None


def warn_of_settings_without_effect(environment: Mapping[str, str]) -> None:
    """Log a warning for each variable that looks like a setting and is none, and for each folder that does not exist."""
    for name, similar in unknown_variables(environment).items():
        logger.warning("%s is not a setting of this server and has no effect.%s", name, f" Is {similar} meant?" if similar else "")
    settings = read_settings(environment)
    for name, value in ((LORAS_VARIABLE, settings.loras), (EMBEDDINGS_VARIABLE, settings.embeddings)):
        folder = Path(value).expanduser().absolute()
        if value and not folder.is_dir():
            logger.warning("%s: %s: no such folder", name, folder)


def checked_model(environment: Mapping[str, str], choose_model: Callable[[], ModelFolder], host: str, *, in_bento: bool) -> ModelFolder:
    """Check whether the server may start at the address `host`, and return its model. Raises SystemExit with the reason if it may not."""
    try:
        read_settings(environment)  # all of them, including those that only other processes use
        model = choose_model()
        safety_policy(environment, model_name=model.name, has_checker=model.has_safety_checker)
        check_shared_state(environment)
        check_exposure(read_access(environment), host, in_bento=in_bento)
    except (ModelFolderError, SettingError) as error:
        raise SystemExit(f"Not started: {error}") from None
    return model
