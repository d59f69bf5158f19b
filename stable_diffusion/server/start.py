"""Checks all settings and the model before any process starts.

So a wrong setting gives one clear message, not a series of crashing workers. Does not depend on BentoML.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from stable_diffusion.core.errors import ModelFolderError, SettingError
from stable_diffusion.core.settings import read_settings, safety_policy
from stable_diffusion.models.folder import ModelFolder
from stable_diffusion.server.access.policy import check_exposure, read_access
from stable_diffusion.state.shared_state import check_shared_state


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
