"""The responses of OpenAI's images API: images, events, the models and errors, field by field in OpenAI's form.

Functions over plain data; `routes.py` calls them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Literal

from PIL import Image
from pydantic import Field
from starlette.responses import JSONResponse, Response
from typing_extensions import NotRequired, TypedDict

from stable_diffusion.api.openai.parameters import OpenaiParameters
from stable_diffusion.api.responses import as_base64, image_file, retry_after, sendable
from stable_diffusion.core.errors import ServiceError
from stable_diffusion.core.types import GeneratedImage, ImageFormat, Task
from stable_diffusion.images.encode import encode_preview
from stable_diffusion.models.folder import ModelFolder
from stable_diffusion.web import sse

PREFIXES = ("/v1/",)  # of the paths whose errors have this form
_PARAMS = {"width": "size", "height": "size"}  # our field, OpenAI's parameter
_CODES = {"unauthorized": "invalid_api_key", "rate_limited": "rate_limit_exceeded"}

_Base64 = Annotated[str, Field(json_schema_extra={"contentEncoding": "base64"})]


class _Look(TypedDict):
    size: Annotated[str, Field(examples=["512x512"])]
    output_format: Annotated[ImageFormat, Field(examples=["png"])]
    background: Literal["opaque"]


class OpenaiImage(TypedDict):
    """A finished image. All fields but the first are additional ones, which OpenAI's clients keep."""

    b64_json: _Base64
    seed: Annotated[int, Field(description="Send it again to get the same image.")]
    safety_flagged: Annotated[
        bool | None, Field(description="true: the image was flagged and is blank. false: it was not. null: no safety check ran.")
    ]
    prompt_dropped: NotRequired[Annotated[str, Field(description="Present only if the prompt was too long: the end that was not used.")]]
    negative_prompt_dropped: NotRequired[Annotated[str, Field(description="The same for the negative prompt.")]]


class OpenaiImages(_Look):
    created: Annotated[int, Field(description="Seconds since 1970.")]
    data: list[OpenaiImage]


class _Event(_Look):
    type: str
    created_at: Annotated[int, Field(description="Seconds since 1970.")]
    quality: Literal["auto"]


class OpenaiPartialImage(_Event):
    b64_json: _Base64
    partial_image_index: int


class OpenaiInputTokens(TypedDict):
    text_tokens: int
    image_tokens: int


class OpenaiUsage(TypedDict):
    """Always 0: tokens are not counted, but typed clients expect these numbers in a stream."""

    total_tokens: int
    input_tokens: int
    output_tokens: int
    input_tokens_details: OpenaiInputTokens


class OpenaiCompleted(_Event, OpenaiImage):
    usage: OpenaiUsage


class OpenaiModel(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class OpenaiModels(TypedDict):
    object: Literal["list"]
    data: list[OpenaiModel]


class OpenaiErrorDetails(TypedDict):
    message: str
    type: Annotated[Literal["invalid_request_error", "server_error"], Field(examples=["invalid_request_error"])]
    param: Annotated[str | None, Field(examples=["size"])]
    code: Annotated[str | None, Field(examples=["invalid_request"])]


class OpenaiError(TypedDict):
    error: OpenaiErrorDetails


ERROR = OpenaiError


class OpenaiErrorEvent(OpenaiError):
    type: Literal["error"]


# By name, in which "{}" is image_generation or image_edit.
EVENTS = {"{}.partial_image": OpenaiPartialImage, "{}.completed": OpenaiCompleted, "error": OpenaiErrorEvent}
_NO_TOKENS: OpenaiInputTokens = {"text_tokens": 0, "image_tokens": 0}
_NO_USAGE: OpenaiUsage = {"total_tokens": 0, "input_tokens": 0, "output_tokens": 0, "input_tokens_details": _NO_TOKENS}


def images_response(tasks: Sequence[Task], images: Sequence[GeneratedImage], model: ModelFolder, asked: OpenaiParameters) -> OpenaiImages:
    """Encodes images: do not call it on an event loop."""
    data = [_described(one, image, model, asked) for one, image in zip(tasks, images, strict=True)]
    return {"created": int(time.time()), "data": data, **_look(tasks[0], asked)}


def partial_image_event(name: str, task: Task, preview: Image.Image, index: int, asked: OpenaiParameters) -> bytes:
    """Encodes an image: do not call it on an event loop."""
    content = encode_preview(preview, (task.width, task.height), asked.output_format)
    data: OpenaiPartialImage = {**_event(name, task, asked), "b64_json": as_base64(content), "partial_image_index": index}
    return sse.event(name, data)


def completed_event(name: str, task: Task, image: GeneratedImage, model: ModelFolder, asked: OpenaiParameters) -> bytes:
    """Encodes an image: do not call it on an event loop."""
    data: OpenaiCompleted = {**_event(name, task, asked), **_described(task, image, model, asked), "usage": _NO_USAGE}
    return sse.event(name, data)


def _event(name: str, task: Task, asked: OpenaiParameters) -> _Event:
    return {"type": name, "created_at": int(time.time()), "quality": "auto", **_look(task, asked)}


def _look(task: Task, asked: OpenaiParameters) -> _Look:
    return {"size": f"{task.width}x{task.height}", "output_format": asked.output_format, "background": "opaque"}


def _described(task: Task, image: GeneratedImage, model: ModelFolder, asked: OpenaiParameters) -> OpenaiImage:
    content = image_file(task, image, model, asked.output_format, asked.output_compression)
    described: OpenaiImage = {"b64_json": as_base64(content), "seed": task.seed, "safety_flagged": image.flagged}
    if image.dropped_prompt:
        described["prompt_dropped"] = image.dropped_prompt
    if image.dropped_negative_prompt:
        described["negative_prompt_dropped"] = image.dropped_negative_prompt
    return described


def models_response(model: ModelFolder) -> OpenaiModels:
    created = int((model.file or model.path).stat().st_mtime)
    return {"object": "list", "data": [{"id": model.name, "object": "model", "created": created, "owned_by": "stable-diffusion"}]}


def error_response(error: ServiceError) -> Response:
    """An error in OpenAI's form."""
    headers = retry_after(error)
    if error.status >= 500 and not headers:
        headers["x-should-retry"] = "false"  # the official clients would otherwise repeat the failing request
    return JSONResponse(_error_body(error.status, error.type, error.message, _param(error)), error.status, headers)


def error_event(error: ServiceError) -> bytes:
    data: OpenaiErrorEvent = {"type": "error", **_error_body(error.status, error.type, error.message, _param(error))}
    return sse.event("error", data)


def refusal(status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> Response:
    """The response to a request that did not reach an endpoint, in OpenAI's form, with OpenAI's code if there is one."""
    return JSONResponse(_error_body(status, _CODES.get(kind, kind), message, None), status, headers)


def _error_body(status: int, code: str, message: str, param: str | None) -> OpenaiError:
    kind: Literal["invalid_request_error", "server_error"] = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": sendable(message), "type": kind, "param": param and sendable(param), "code": code}}


def _param(error: ServiceError) -> str | None:
    field = error.problems[0].field
    return field and _PARAMS.get(field, field)
