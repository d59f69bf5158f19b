"""Pictures and errors as answers of the plain endpoints: bytes, headers, JSON. One form for all doors that have none of their own.

Knows nothing of who draws.
"""

from __future__ import annotations

import base64
import functools
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from stable_diffusion import events
from stable_diffusion.engine.job import Picture, Progress, Task
from stable_diffusion.errors import ClientGone, FieldError, InternalError, ServiceError
from stable_diffusion.images import MEDIA_TYPES, ImageFormat
from stable_diffusion.weights import ModelFolder

logger = logging.getLogger("stable_diffusion")

_MAX_HEADER_CHARACTERS = 1024  # of a text in a header; proxies allow 4 KB for all of them together
# What may stand in a header as it is; everything else, and "%" itself, is percent-encoded.
_PLAIN_IN_HEADERS = " !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"


def answering_errors(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The one place where errors become answers."""

    @functools.wraps(endpoint)
    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Exception as error:
            known = known_error(error, request.url.path)
            return error_response(known.status, known.type, known.message, known.problems)

    return answer


def known_error(error: Exception, where: str) -> ServiceError:
    """What is told of an error. One that nobody foresaw goes to the log, with `where`."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, ClientDisconnect):
        return ClientGone("the client closed the connection")
    logger.error("%s failed.", where, exc_info=error)
    return InternalError("an internal error, the server's log has the details")


def refusal(status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> Response:
    return error_response(status, kind, message, [FieldError(None, message)], headers)


def error_response(status: int, kind: str, message: str, problems: list[FieldError], headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(error_body(kind, message, problems), status, headers)


def error_body(kind: str, message: str, problems: list[FieldError]) -> dict[str, Any]:
    listed = [{"field": problem.field and _sendable(problem.field), "message": _sendable(problem.message)} for problem in problems]
    return {"error": {"type": kind, "message": _sendable(message), "problems": listed}}


def _sendable(text: str) -> str:
    """A name that a client sent may hold half of a surrogate pair, which UTF-8 cannot say."""
    return text.encode("utf-8", "replace").decode("utf-8")


def as_data(content: bytes, image_format: ImageFormat) -> dict[str, str]:
    return {"media_type": MEDIA_TYPES[image_format], "image": base64.b64encode(content).decode("ascii")}


def progress_event(progress: Progress) -> bytes:
    seconds_left = round(progress.seconds_left, 1)
    if progress.position:
        return events.event("queued", {"position": progress.position, "seconds_left": seconds_left})
    return events.event("progress", {"step": progress.step, "steps": progress.steps, "seconds_left": seconds_left})


def parameters_of(task: Task, picture: Picture, model: ModelFolder) -> dict[str, Any]:
    """Every resolved parameter under its own name, as in the reference."""
    parameters = {
        "prompt": task.prompt,
        "negative_prompt": task.negative_prompt,
        "prompt_dropped": picture.dropped_prompt or None,
        "negative_prompt_dropped": picture.dropped_negative_prompt or None,
        "height": task.height,
        "width": task.width,
        "num_inference_steps": task.num_inference_steps,
        "guidance_scale": task.guidance_scale,
        "guidance_end": task.guidance_end,
        "seed": task.seed,
        "scheduler": task.scheduler,
        "strength": None if task.kind == "txt2img" else task.strength,
        "safety_check": task.safety_check,
        "safety_flagged": "unchecked" if picture.flagged is None else picture.flagged,
        "model": model.name,
    }
    return {name: value for name, value in parameters.items() if value is not None}


def parameter_headers(task: Task, picture: Picture, model: ModelFolder) -> dict[str, str]:
    parameters = parameters_of(task, picture, model)
    return {name: _header_text(value if isinstance(value, str) else json.dumps(value)) for name, value in parameters.items()}


def _header_text(text: str) -> str:
    """Percent-encoded UTF-8, cut at a whole character."""
    encoded = ""
    for character in text:
        piece = quote(character, safe=_PLAIN_IN_HEADERS)
        if len(encoded) + len(piece) > _MAX_HEADER_CHARACTERS:
            break
        encoded += piece
    return encoded
