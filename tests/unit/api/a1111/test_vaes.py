"""Which autoencoder A1111's API says that the server has, and which it accepts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stable_diffusion.api.a1111.parameters import Options
from stable_diffusion.api.a1111.responses import options_response, vaes_response
from stable_diffusion.api.a1111.routes import require_served
from stable_diffusion.core.errors import NotFound
from stable_diffusion.models.folder import DEMO_FOLDER, ModelFolder, check_model

OWN = check_model(DEMO_FOLDER)
OTHER = replace(OWN, vae=Path("/models/vaes/soft.safetensors"))


def test_the_autoencoder_that_replaces_the_models_is_named_without_its_folder() -> None:
    assert (vaes_response(OWN), options_response(OWN)["sd_vae"]) == ([], "Automatic")
    assert vaes_response(OTHER) == [{"model_name": "soft.safetensors", "filename": "soft.safetensors"}]
    assert options_response(OTHER)["sd_vae"] == "soft.safetensors"


@pytest.mark.parametrize(("model", "accepted", "refused"), [(OWN, "None", "soft.safetensors"), (OTHER, "soft.safetensors", "None")])
def test_only_the_served_autoencoder_is_accepted(model: ModelFolder, accepted: str, refused: str) -> None:
    def options(name: str | None) -> Options:
        return Options(sd_model_checkpoint=None, sd_vae=name, enable_pnginfo=None, CLIP_stop_at_last_layers=None)

    for name in (None, "", "Automatic", accepted):
        require_served(options(name), model)
    with pytest.raises(NotFound, match=f"sd_vae: must be Automatic or {accepted} on this server, got '{refused}'"):
        require_served(options(refused), model)
