"""The OpenAPI 3.1 document, made of the request models, and the page that shows it. Knows nothing of how requests are answered."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from stable_diffusion import a1111_docs, events, jobs_docs, keys_docs, openai_docs, reproduce_docs, status_docs
from stable_diffusion.images import MEDIA_TYPES, UPLOADS_IN_WORDS
from stable_diffusion.load_docs import LOAD_ERRORS, TIMEOUT_PARAMETER
from stable_diffusion.requests import GenerationRequest, ImageToImageRequest, TextToImageRequest

_ANSWER_HEADERS = {
    "prompt": "The prompt as it was used. Text in headers is percent-encoded UTF-8, cut after 1024 characters.",
    "negative_prompt": "The negative prompt as it was used.",
    "prompt_dropped": "Only there if the prompt was too long: the end of it that was not used.",
    "negative_prompt_dropped": "Only there if the negative prompt was too long: the end of it that was not used.",
    "height": "Height in pixels.",
    "width": "Width in pixels.",
    "num_inference_steps": "Denoising steps.",
    "guidance_scale": "Guidance scale.",
    "guidance_end": "The share of the steps that were guided.",
    "seed": "The seed: send it again to get the same picture.",
    "scheduler": "Noise scheduler.",
    "strength": "Strength (img2img and inpaint only).",
    "safety_check": "Whether the safety checker was to look at the picture, where the model has one.",
    "safety_flagged": "true: the picture was flagged and is blank. false: it was not. unchecked: nobody looked.",
    "model": "The model; `demo` is the embedded demo model.",
    "Job-Id": "The id of this request's job.",
}
_ERRORS = {
    "400": "A field or a part is missing, malformed or out of range.",
    "403": "A page of another site sent it, in a browser.",
    "406": "The Accept header allows none of the image types.",
    "408": "The body stalled or came too slowly; the connection is closed.",
    "413": "The body or an image is too large.",
    "415": "The body is not of the type that the endpoint takes.",
    "500": "The picture could not be computed.",
    **{status: text for status, text in LOAD_ERRORS.items() if status not in jobs_docs.ERRORS},
}
_EXAMPLE = {"prompt": "a small red circle on a blue background", "num_inference_steps": 50, "guidance_scale": 7.5, "seed": 1}


def document(title: str, version: str) -> dict[str, Any]:
    """The whole API as a JSON-serialisable OpenAPI 3.1 document."""
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": title,
            "version": version,
            "description": "Stable Diffusion: text to image, image to image and inpainting. The answer is the image itself.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [
            {"name": "images", "description": "Draw"},
            reproduce_docs.TAG,
            jobs_docs.TAG,
            openai_docs.TAG,
            a1111_docs.TAG,
            status_docs.TAG,
        ],
        "paths": {
            "/txt2img": _draws(
                "txt2img",
                "Draw a picture from text",
                {"application/json": {"schema": _reference(TextToImageRequest), "example": _EXAMPLE}},
            ),
            "/img2img": _draws(
                "img2img", "Redraw a picture as a text says", _multipart({"img": f"The picture to start from: {UPLOADS_IN_WORDS}"})
            ),
            "/inpaint": _draws(
                "inpaint",
                "Repaint a part of a picture",
                _multipart(
                    {
                        "img": f"The picture to repaint: {UPLOADS_IN_WORDS}",
                        "mask": f"White is repainted, black is kept, grey blends. Of the picture's proportions. {UPLOADS_IN_WORDS}",
                    }
                ),
            ),
            "/reproduce": reproduce_docs.added_to(_draws("reproduce", "Draw a picture again", reproduce_docs.form(UPLOADS_IN_WORDS))),
            **jobs_docs.paths(),
            **openai_docs.paths(),
            **a1111_docs.paths(),
            "/livez": _probe("livez", "Is the server process alive?"),
            "/readyz": _probe("readyz", "Is the model loaded?"),
            **status_docs.paths(),
        },
        "security": keys_docs.SECURITY,
        "components": {
            "securitySchemes": keys_docs.SECURITY_SCHEMES,
            "schemas": {model.__name__: _schema(model) for model in (TextToImageRequest, ImageToImageRequest)}
            | reproduce_docs.SCHEMAS
            | jobs_docs.schemas()
            | openai_docs.schemas()
            | a1111_docs.schemas()
            | {"Error": _ERROR_SCHEMA},
        },
    }
    return {**described, "paths": keys_docs.with_keys(described["paths"])}


def _reference(model: type[GenerationRequest]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _schema(model: type[GenerationRequest]) -> dict[str, Any]:
    schema = model.model_json_schema()
    schema["description"] = schema["description"].splitlines()[0]
    return schema


_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["type", "message", "problems"],
            "properties": {
                "type": {"type": "string", "examples": ["invalid_request"]},
                "message": {"type": "string", "examples": ["height: must be a multiple of 8, 100 is not"]},
                "problems": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["field", "message"],
                        "properties": {"field": {"type": ["string", "null"]}, "message": {"type": "string"}},
                    },
                },
            },
        }
    },
}


def _multipart(parts: dict[str, str]) -> dict[str, Any]:
    files = {name: {"type": "string", "format": "binary", "description": text} for name, text in parts.items()}
    return {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": [*parts, "data"],
                "properties": {**files, "data": {**_reference(ImageToImageRequest), "example": {**_EXAMPLE, "strength": 0.8}}},
            },
            "encoding": {"data": {"contentType": "application/json"}},
        }
    }


def _draws(name: str, summary: str, content: dict[str, Any]) -> dict[str, Any]:
    headers = {
        header: {"description": text, "schema": {"type": "string"}}
        for header, text in _ANSWER_HEADERS.items()
        if header != "strength" or name != "txt2img"
    }
    answers: dict[str, Any] = {
        "200": {
            "description": "The picture. Or, where Accept asks for text/event-stream, what happens until it is there: the events "
            "queued, progress, preview, completed and error, each with JSON.",
            "headers": headers,
            "content": {media_type: {} for media_type in (*MEDIA_TYPES.values(), events.MEDIA_TYPE)},
        }
    }
    answers |= {"202": jobs_docs.ACCEPTED, **jobs_docs.ERRORS}
    for status, text in _ERRORS.items():
        answers[status] = {"description": text, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    return {
        "post": {
            "operationId": name,
            "summary": summary,
            "tags": ["images"],
            "parameters": [*jobs_docs.REQUEST_HEADERS, TIMEOUT_PARAMETER],
            "requestBody": {"required": True, "content": content},
            "responses": answers,
        }
    }


def _probe(name: str, summary: str) -> dict[str, Any]:
    answers: dict[str, Any] = {"200": {"description": "Yes.", "content": {"text/plain": {"schema": {"type": "string"}}}}}
    if name == "readyz":
        answers["503"] = {"description": "Not yet."}
    return {"get": {"operationId": name, "summary": summary, "tags": [status_docs.TAG["name"]], "responses": answers}}


PAGE_ASSETS = ("swagger-ui.css", "swagger-ui-bundle.js")
_STYLE = "body > p { max-width: 1420px; margin: 1rem auto 0; padding: 0 20px; font: 1rem sans-serif }"
_SCRIPT = """
      window.ui = SwaggerUIBundle({
        url: "./docs.json",
        dom_id: "#swagger-ui",
        deepLinking: true,
        tryItOutEnabled: true,
        validatorUrl: null,
        docExpansion: "list",
        defaultModelsExpandDepth: 0,
        presets: [SwaggerUIBundle.presets.apis]
      });
    """
# BentoML's own page loads Google Tag Manager in the visitor's browser; this one loads only the assets that BentoML ships.
PAGE = f"""<!DOCTYPE html>
<html lang="en">
  <head>
    <meta charset="utf-8">
    <meta name="viewport" content="width=device-width, initial-scale=1">
    <title>Stable Diffusion</title>
    <link rel="icon" href="data:,">
    <link rel="stylesheet" href="./static_content/swagger-ui.css">
    <style>{_STYLE}</style>
  </head>
  <body>
    <p><a href="./ui/">A page to draw with</a></p>
    <div id="swagger-ui"></div>
    <script src="./static_content/swagger-ui-bundle.js"></script>
    <script>{_SCRIPT}</script>
  </body>
</html>
"""


def _source(inline: str) -> str:
    """What a Content-Security-Policy calls this inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"


PAGE_HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'self'",
            f"script-src 'self' {_source(_SCRIPT)}",
            f"style-src 'self' {_source(_STYLE)}",
            "img-src 'self' blob: data:",  # what was drawn, and Swagger's own icons
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "Referrer-Policy": "no-referrer",
}
