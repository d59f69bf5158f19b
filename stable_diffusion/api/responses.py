"""Images and errors as responses of the native API: bytes, headers, JSON, events. APIs without an error form of their own use it too.

`api/deliver.py` decides which of these a client gets.
"""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Annotated, Any
from urllib.parse import quote

from PIL import Image
from pydantic import Field, NonNegativeFloat, NonNegativeInt
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from typing_extensions import TypedDict

from stable_diffusion.core.errors import ClientGone, FieldError, ServiceError, as_service_error
from stable_diffusion.core.types import GeneratedImage, ImageFormat, Progress, Task
from stable_diffusion.images import infotext
from stable_diffusion.images.encode import MEDIA_TYPES, encode, encode_preview
from stable_diffusion.models.folder import ModelFolder
from stable_diffusion.state.folder import server_token
from stable_diffusion.state.job_record import IMAGES_KEPT_S
from stable_diffusion.state.shared_state import is_shared
from stable_diffusion.web import sse

SERVER_COOKIE = "job_server"
_MAX_HEADER_CHARACTERS = 1024  # of a text in a header; proxies allow 4 KB for all headers together
# Characters that headers contain unchanged. All others, including "%", are percent-encoded.
_PLAIN_IN_HEADERS = " !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"


class FieldProblem(TypedDict):
    field: str | None
    message: str


class ErrorDetails(TypedDict):
    type: Annotated[str, Field(examples=["invalid_request"])]
    message: Annotated[str, Field(examples=["height: must be a multiple of 8, 100 is not"])]
    problems: list[FieldProblem]


class Error(TypedDict):
    error: ErrorDetails


Attempt = Annotated[
    int,
    Field(ge=1, description="Above 1 if machines share jobs and images of this one were taken away from a machine. Then `step` fell."),
]


class QueuedEvent(TypedDict):
    attempt: Attempt
    position: NonNegativeInt
    seconds_left: NonNegativeFloat


class ProgressEvent(TypedDict):
    attempt: Attempt
    step: NonNegativeInt
    steps: NonNegativeInt
    seconds_left: NonNegativeFloat


class EncodedImage(TypedDict):
    media_type: Annotated[str, Field(json_schema_extra={"enum": list(MEDIA_TYPES.values())})]
    image: Annotated[str, Field(json_schema_extra={"contentEncoding": "base64"})]


class PreviewEvent(EncodedImage):
    step: NonNegativeInt


class CompletedEvent(EncodedImage):
    parameters: Annotated[dict[str, Any], Field(description="The values of an image's headers.")]


def error_response(error: ServiceError) -> Response:
    return json_error(error.status, error.type, error.message, error.problems, retry_after(error))


def retry_after(error: ServiceError) -> dict[str, str]:
    """The header Retry-After, if the error says when to try again."""
    return {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}


def with_error_responses(
    endpoint: Callable[[Request], Awaitable[Response]], response_of: Callable[[ServiceError], Response] = error_response
) -> Callable[[Request], Awaitable[Response]]:
    """Turn an endpoint's errors into responses. APIs with another form of errors pass their own `response_of`."""

    @functools.wraps(endpoint)
    async def respond(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Exception as error:
            known = known_error(error, request.url.path)
            response = response_of(known)
            if known.closes_connection:
                response.headers["Connection"] = "close"
            return response

    return respond


def known_error(error: BaseException, where: str) -> ServiceError:
    """The error that the client sees. An unexpected error is logged with `where`."""
    return ClientGone("the client closed the connection") if isinstance(error, ClientDisconnect) else as_service_error(error, where)


def refusal(status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> Response:
    return json_error(status, kind, message, [FieldError(None, message)], headers)


def json_error(status: int, kind: str, message: str, problems: list[FieldError], headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(error_body(kind, message, problems), status, headers)


def error_body(kind: str, message: str, problems: list[FieldError]) -> Error:
    listed: list[FieldProblem] = [
        {"field": problem.field and sendable(problem.field), "message": sendable(problem.message)} for problem in problems
    ]
    return {"error": {"type": kind, "message": sendable(message), "problems": listed}}


def sendable(text: str) -> str:
    """Replace lone surrogates, which clients' texts may contain and UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode("utf-8")


def image_file(task: Task, image: GeneratedImage, model: ModelFolder, image_format: ImageFormat, quality: int | None = None) -> bytes:
    """Encode the image, with its description if the task asks for it. A flagged image, which is blank, gets no description."""
    description = infotext.write(task, image, model) if task.metadata and not image.flagged else None
    return encode(image.image, image_format, description, quality)


def image_response(
    task: Task, image: GeneratedImage, model: ModelFolder, image_format: ImageFormat, remarks: Mapping[str, Any] | None = None
) -> Response:
    """The image as the body, its parameters and `remarks` as headers. Encoding takes up to a second."""
    headers = parameter_headers(task, image, model) | as_headers(remarks or {})
    headers["content-disposition"] = f'inline; filename="{task.kind}-{task.seed}.{image_format}"'
    return Response(image_file(task, image, model, image_format), media_type=MEDIA_TYPES[image_format], headers=headers)


class EventStream(StreamingResponse):
    """Server-sent events, which are closed when the client leaves.

    Starlette leaves that to the garbage collector, which closes all nested generators at the same moment.
    """

    def __init__(self, pieces: AsyncGenerator[bytes, None]) -> None:
        self._pieces = sse.kept_alive(pieces)
        super().__init__(self._pieces, media_type=sse.MEDIA_TYPE, headers=sse.HEADERS | followed_headers())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._pieces.aclose()


def followed_headers() -> dict[str, str]:
    """For responses that name a running job: a cookie by which a load balancer can route later requests for the job to this server.

    Machines that share their state need none.
    """
    if is_shared():
        return {}
    return {"Set-Cookie": f"{SERVER_COOKIE}={server_token()}; Path=/; Max-Age={IMAGES_KEPT_S}; HttpOnly; SameSite=Lax"}


def progress_event(progress: Progress, attempt: int = 1, event_id: str | None = None) -> bytes:
    seconds_left = round(progress.seconds_left, 1)
    if progress.position:
        return sse.event("queued", QueuedEvent(attempt=attempt, position=progress.position, seconds_left=seconds_left), event_id)
    data = ProgressEvent(attempt=attempt, step=progress.step, steps=progress.steps, seconds_left=seconds_left)
    return sse.event("progress", data, event_id)


def preview_event(step: int, preview: Image.Image, task: Task, event_id: str | None = None) -> bytes:
    """The event `preview`. Encodes an image: do not call it on an event loop."""
    content = encode_preview(preview, (task.width, task.height))
    data: PreviewEvent = {"step": step, **_as_data(content, "jpeg")}
    return sse.event("preview", data, event_id)


def completed_event(
    task: Task,
    image: GeneratedImage,
    model: ModelFolder,
    image_format: ImageFormat,
    remarks: Mapping[str, Any] | None = None,
    event_id: str | None = None,
) -> bytes:
    """The event `completed`, with `remarks` among the parameters. Encodes an image: do not call it on an event loop."""
    parameters = {**parameters_of(task, image, model), **(remarks or {})}
    content = image_file(task, image, model, image_format)
    data: CompletedEvent = {**_as_data(content, image_format), "parameters": parameters}
    return sse.event("completed", data, event_id)


def error_event(error: Exception, where: str, event_id: str | None = None) -> bytes:
    known = known_error(error, where)
    return sse.event("error", error_body(known.type, known.message, known.problems), event_id)


def _as_data(content: bytes, image_format: ImageFormat) -> EncodedImage:
    return {"media_type": MEDIA_TYPES[image_format], "image": as_base64(content)}


def as_base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def parameters_of(task: Task, image: GeneratedImage, model: ModelFolder) -> dict[str, Any]:
    """Every resolved parameter under its name in the request."""
    parameters = {
        "prompt": task.prompt,
        "negative_prompt": task.negative_prompt,
        "prompt_dropped": image.dropped_prompt or None,
        "negative_prompt_dropped": image.dropped_negative_prompt or None,
        "height": task.height,
        "width": task.width,
        "num_inference_steps": task.num_inference_steps,
        "guidance_scale": task.guidance_scale,
        "guidance_end": task.guidance_end,
        "eta": task.eta or None,
        "seed": task.seed,
        "scheduler": task.scheduler,
        "strength": None if task.kind == "txt2img" else task.strength,
        "prompt_syntax": task.prompt_syntax,
        "clip_skip": task.clip_skip,
        "loras": [{"name": one.name, "weight": one.unet_weight} for one in task.loras] or None,
        "safety_check": task.safety_check,
        "safety_flagged": "unchecked" if image.flagged is None else image.flagged,
        "decoded_again": ", ".join(["float32"] * image.decoded_again + ["tiles"] * image.tiled) or None,
        "model": model.name,
    }
    return {name: value for name, value in parameters.items() if value is not None}


def parameter_headers(task: Task, image: GeneratedImage, model: ModelFolder) -> dict[str, str]:
    return as_headers(parameters_of(task, image, model))


def as_headers(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: _header_text(value if isinstance(value, str) else json.dumps(value)) for name, value in values.items()}


def _header_text(text: str) -> str:
    """Percent-encoded UTF-8, cut after a whole character, without surrounding white space, which servers do not send."""
    encoded = ""
    for character in text:
        piece = quote(character, safe=_PLAIN_IN_HEADERS)
        if len(encoded) + len(piece) > _MAX_HEADER_CHARACTERS:
            break
        encoded += piece
    return encoded.strip()
