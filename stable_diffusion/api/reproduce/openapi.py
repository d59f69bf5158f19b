"""POST /reproduce in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from stable_diffusion.api.openapi import generates, json_content, multipart
from stable_diffusion.api.reproduce.reproduction import DryRun
from stable_diffusion.core.requests import ReproductionRequest
from stable_diffusion.images.decode import UPLOADS_IN_WORDS

TAG = {"name": "reproduce", "description": "Draw a picture again from what its file says"}
_DIFFERS = "What differs from the way the picture was drawn at first, `nothing` if nothing is known to."


def _form(picture: str) -> dict[str, Any]:
    """The request body. `picture` describes what may be uploaded."""
    parts = {
        "picture": f"A picture drawn by this server or by A1111, as its file was written. {picture}",
        "img": f"Only for img2img and inpaint: what it was drawn from, which its file does not hold. {picture}",
        "mask": f"Only for inpaint: the mask. {picture}",
    }
    return multipart(parts, ("picture",), ReproductionRequest, {"dry_run": True})


def _added_to(path: dict[str, Any]) -> dict[str, Any]:
    """A path item of an operation that generates, with the additional responses of this one."""
    operation = path["post"]
    drawn = operation["responses"]["200"]
    answers = {
        **drawn,
        "headers": {**drawn["headers"], "differs": {"description": _DIFFERS, "schema": {"type": "string"}}},
        "content": {**drawn["content"], **json_content(DryRun)},
    }
    return {"post": {**operation, "tags": [TAG["name"]], "responses": {**operation["responses"], "200": answers}}}


def paths() -> dict[str, Any]:
    return {"/reproduce": _added_to(generates("reproduce", "Draw a picture again", _form(UPLOADS_IN_WORDS)))}
