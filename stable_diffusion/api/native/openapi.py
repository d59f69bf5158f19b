"""The native API (/txt2img, /img2img and /inpaint) in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from stable_diffusion.api.openapi import EXAMPLE, IMAGES_TAG, generates, json_content, multipart
from stable_diffusion.core.requests import ImageToImageRequest, TextToImageRequest
from stable_diffusion.images.decode import UPLOADS_IN_WORDS

TAG = IMAGES_TAG
_EXAMPLE = {**EXAMPLE, "strength": 0.8}


def paths() -> dict[str, Any]:
    from_text = json_content(TextToImageRequest, example=EXAMPLE)
    start = {"img": f"The picture to start from: {UPLOADS_IN_WORDS}"}
    masked = {
        "img": f"The picture to repaint: {UPLOADS_IN_WORDS}",
        "mask": f"White is repainted, black is kept, grey blends. Of the picture's proportions. {UPLOADS_IN_WORDS}",
    }
    from_picture = multipart(start, ("img", "data"), ImageToImageRequest, _EXAMPLE)
    from_both = multipart(masked, ("img", "mask", "data"), ImageToImageRequest, _EXAMPLE)
    return {
        "/txt2img": generates("txt2img", "Draw a picture from text", from_text),
        "/img2img": generates("img2img", "Redraw a picture as a text says", from_picture),
        "/inpaint": generates("inpaint", "Repaint a part of a picture", from_both),
    }
