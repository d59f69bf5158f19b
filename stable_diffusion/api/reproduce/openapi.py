"""POST /reproduce in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from stable_diffusion.api.openapi import generates, json_content, multipart
from stable_diffusion.api.reproduce.routes import DryRun
from stable_diffusion.core.requests import ReproductionRequest
from stable_diffusion.images.decode import UPLOADS_IN_WORDS

TAG = {"name": "reproduce", "description": "Draw a picture again from what its file says"}
_DIFFERS = "What differs from the way the picture was drawn at first, `nothing` if nothing is known to."


def paths() -> dict[str, Any]:
    parts = {
        "picture": f"A picture drawn by this server or by A1111, as its file was written. {UPLOADS_IN_WORDS}",
        "img": f"Only for img2img and inpaint: what it was drawn from, which its file does not hold. {UPLOADS_IN_WORDS}",
        "mask": f"Only for inpaint: the mask. {UPLOADS_IN_WORDS}",
    }
    form = multipart(parts, ("picture",), ReproductionRequest, {"dry_run": True})
    item = generates("reproduce", "Draw a picture again", form, TAG, {"differs": _DIFFERS}, **json_content(DryRun))
    return {"/reproduce": item}
