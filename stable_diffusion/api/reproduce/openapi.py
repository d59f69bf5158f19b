"""POST /reproduce in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from stable_diffusion.api.openapi import generates, multipart, schema_reference
from stable_diffusion.core.requests import ReproductionRequest
from stable_diffusion.images.decode import UPLOADS_IN_WORDS

TAG = {"name": "reproduce", "description": "Draw a picture again from what its file says"}
SCHEMAS: dict[str, Any] = {ReproductionRequest.__name__: ReproductionRequest.model_json_schema()}
_DIFFERS = "What differs from the way the picture was drawn at first, `nothing` if nothing is known to."
_DRY_RUN = {
    "type": "object",
    "required": ["kind", "parameters", "missing", "differs"],
    "properties": {
        "kind": {"enum": ["txt2img", "img2img", "inpaint"]},
        "parameters": {"type": "object", "description": "The fields of a request that draws it again."},
        "missing": {"type": "array", "items": {"type": "string"}, "description": "Parts that drawing it needs and that were not sent."},
        "differs": {
            "type": "array",
            "items": {"type": "string"},
            "description": "What would differ, as far as it is known before drawing.",
            "examples": [["Model: v1_4 (d3f0a1b2c3), here demo (b7503e29ef)", "torch: 2.12.0, here 2.13.0"]],
        },
    },
}


def _form(picture: str) -> dict[str, Any]:
    """The request body. `picture` describes what may be uploaded."""
    parts = {
        "picture": f"A picture drawn by this server or by A1111, as its file was written. {picture}",
        "img": f"Only for img2img and inpaint: what it was drawn from, which its file does not hold. {picture}",
        "mask": f"Only for inpaint: the mask. {picture}",
    }
    return multipart(parts, ("picture",), {**schema_reference(ReproductionRequest), "example": {"dry_run": True}})


def _added_to(path: dict[str, Any]) -> dict[str, Any]:
    """A path item of an operation that generates, with the additional responses of this one."""
    operation = path["post"]
    drawn = operation["responses"]["200"]
    answers = {
        **drawn,
        "headers": {**drawn["headers"], "differs": {"description": _DIFFERS, "schema": {"type": "string"}}},
        "content": {**drawn["content"], "application/json": {"schema": _DRY_RUN}},
    }
    return {"post": {**operation, "tags": [TAG["name"]], "responses": {**operation["responses"], "200": answers}}}


def paths() -> dict[str, Any]:
    return {"/reproduce": _added_to(generates("reproduce", "Draw a picture again", _form(UPLOADS_IN_WORDS)))}
