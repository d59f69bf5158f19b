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
    start = {"img": f"The initial image: {UPLOADS_IN_WORDS}"}
    masked = {
        "img": f"The image to repaint: {UPLOADS_IN_WORDS}",
        "mask": f"White is repainted, black is kept, grey blends. Must have the image's proportions. {UPLOADS_IN_WORDS}",
    }
    from_image = multipart(start, ("img", "data"), ImageToImageRequest, _EXAMPLE)
    from_both = multipart(masked, ("img", "mask", "data"), ImageToImageRequest, _EXAMPLE)
    return {
        "/txt2img": generates("txt2img", "Generate an image from text", from_text),
        "/img2img": generates("img2img", "Generate an image from an image and text", from_image),
        "/inpaint": generates("inpaint", "Repaint a part of an image", from_both),
    }
