"""The HTTP side: endpoints, headers, errors. `create_service` makes the BentoML service of both precisions.

Runs in API workers, which load no torch: what is computed crosses to the runner as `runnable.py` packs it.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import logging
import warnings
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import bentoml
from bentoml._internal.utils import BentoMLDeprecationWarning
from bentoml.legacy import Service
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_diffusion import events, images, openapi
from stable_diffusion.answers import answering_errors, encoded, error_body, known_error, parameter_headers, parameters_of, refusal
from stable_diffusion.draining import Draining
from stable_diffusion.drawing import draw, news_of
from stable_diffusion.engine.job import Kind, Progress, Task
from stable_diffusion.errors import (
    ClientGone,
    InvalidRequest,
    ModelFolderError,
    NotAcceptable,
    TooLarge,
    UnsupportedMediaType,
)
from stable_diffusion.images import MEDIA_TYPES, ImageFormat
from stable_diffusion.requests import (
    GenerationRequest,
    ImageToImageRequest,
    parse_image_to_image,
    parse_json,
    parse_text_to_image,
    random_seed,
)
from stable_diffusion.weights import ModelFolder

logger = logging.getLogger("stable_diffusion")

# Services with runners are "legacy" to BentoML 1.4 and on purpose here: docs/architecture.md says why.
warnings.filterwarnings("ignore", category=BentoMLDeprecationWarning)

API_VERSION = "1.0.0"
_MAX_JSON_BYTES = 2**20
_MAX_FORM_BYTES = 2 * images.MAX_UPLOAD_BYTES + 2 * _MAX_JSON_BYTES
_MAX_DECODES = 2  # at once in a worker

T = TypeVar("T")


def create_service(name: str, runner: bentoml.Runner, choose_model: Callable[[], ModelFolder]) -> Service:
    """The BentoML service `name`: `runner` draws, `choose_model` says which model it has loaded (or raises ModelFolderError)."""
    logger.setLevel(logging.INFO)
    choose_model = functools.lru_cache(maxsize=1)(choose_model)
    service = Service(name, runners=[runner])

    def check_weights() -> None:
        """Runs once, before any process is started: one clear line instead of workers that die one after the other."""
        try:
            model = choose_model()
        except ModelFolderError as error:
            raise SystemExit(f"Not started: {error}") from None
        if model.is_demo:
            logger.warning("Serving the demo model, which draws coloured shapes only. 'make model' downloads Stable Diffusion v1.4.")

    service.on_deployment(check_weights)
    service.mount_asgi_app(_application(runner, choose_model), path="/")
    stopping = refusal(503, "shutting_down", "the server is shutting down, try again in a minute", {"Connection": "close"})
    service.add_asgi_middleware(Draining, refusal=stopping)
    service.add_asgi_middleware(_FrontDoor, document=openapi.document(name, API_VERSION))
    return service


class _FrontDoor:
    """Answers `/` and `/docs.json` in place of BentoML's routes, which come before those of a mounted application.

    Refuses what is no path of ours before BentoML's metrics see it: they keep a series for every path that is tried.
    """

    def __init__(self, app: ASGIApp, document: dict[str, Any]) -> None:
        self._app = app
        self._pages: dict[str, Response] = {"/": HTMLResponse(openapi.PAGE), "/docs.json": JSONResponse(document)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: ASGIApp = self._app
        if scope["type"] == "http":
            path, method = scope["path"], scope["method"]
            if path not in self._pages and path not in _METHODS:
                answer = refusal(404, "not_found", f"no such path: {path[:200]}")
            elif method == "OPTIONS":
                answer = self._app  # a browser's question before a request from another site: BentoML's CORS setting answers it
            elif method not in (allowed := _METHODS.get(path, _READ)):
                answer = refusal(
                    405, "method_not_allowed", f"{method} is not allowed here, use {allowed[0]}", {"Allow": ", ".join(allowed)}
                )
            elif path in self._pages:
                answer = self._pages[path]
        await answer(scope, receive, send)


_READ = ("GET", "HEAD")
_METHODS = {
    **dict.fromkeys(("/livez", "/readyz", "/healthz", "/metrics"), _READ),
    **{f"/static_content/{name}": _READ for name in openapi.PAGE_ASSETS},
    **dict.fromkeys(("/txt2img", "/img2img", "/inpaint"), ("POST",)),
}


def _application(runner: bentoml.Runner, choose_model: Callable[[], ModelFolder]) -> Starlette:
    # A picture of the largest size takes some 300 MB while it is decoded.
    decoding = asyncio.Semaphore(_MAX_DECODES)

    async def txt2img(request: Request) -> Response:
        parameters = parse_text_to_image(await _read_json_body(request))
        model = _model_for_whole_pictures(choose_model())
        size = parameters.width or model.native_width, parameters.height or model.native_height
        return await _answer(request, runner, model, _task("txt2img", parameters, size, model), parameters)

    async def img2img(request: Request) -> Response:
        parameters, files = await _read_form(request, "img")
        model = _model_for_whole_pictures(choose_model())
        async with decoding:
            image, _ = await run_in_threadpool(_fitted_inputs, files, parameters, model)
        return await _answer(request, runner, model, _task("img2img", parameters, image.size, model, image), parameters)

    async def inpaint(request: Request) -> Response:
        parameters, files = await _read_form(request, "img", "mask")
        model = choose_model()
        async with decoding:
            image, mask = await run_in_threadpool(_fitted_inputs, files, parameters, model)
        return await _answer(request, runner, model, _task("inpaint", parameters, image.size, model, image, mask), parameters)

    endpoints = {"/txt2img": txt2img, "/img2img": img2img, "/inpaint": inpaint}
    return Starlette(routes=[Route(path, answering_errors(endpoint), methods=["POST"]) for path, endpoint in endpoints.items()])


def _model_for_whole_pictures(model: ModelFolder) -> ModelFolder:
    if model.only_inpaints:
        raise InvalidRequest(f"the model {model.name} only inpaints, use /inpaint")
    return model


# --- reading a request -----------------------------------------------------------------------------


async def _read_json_body(request: Request) -> dict[str, Any]:
    _require_content_type(request, "application/json")
    return parse_json(await _limited(request, _MAX_JSON_BYTES).body(), "body")


async def _read_form(request: Request, *files: str) -> tuple[ImageToImageRequest, dict[str, bytes]]:
    """The `data` part, validated, and the bytes of the named file parts."""
    _require_content_type(request, "multipart/form-data")
    try:
        async with _limited(request, _MAX_FORM_BYTES).form(max_files=8, max_fields=8, max_part_size=_MAX_JSON_BYTES) as form:
            _refuse_unknown_parts(form, (*files, "data"))
            contents = {name: await _file_part(form, name) for name in files}
            parameters = parse_image_to_image(parse_json(await _data_part(form), "data"))
    except (MultiPartException, HTTPException) as error:
        reason = error.message if isinstance(error, MultiPartException) else error.detail
        raise InvalidRequest(f"body: not a readable multipart form: {reason}", field="body") from None
    return parameters, contents


def _require_content_type(request: Request, expected: str) -> None:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != expected:
        given = f"not {content_type[:60]}" if content_type else "it is missing"
        raise UnsupportedMediaType(f"Content-Type must be {expected}, {given}", field="Content-Type")


def _limited(request: Request, max_bytes: int) -> Request:
    """The same request, whose body may have at most `max_bytes`, whether it says how long it is or not."""
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise TooLarge(f"the body has more than {max_bytes} bytes", field="body")
        return message

    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise TooLarge(f"the body has {int(declared)} bytes, at most {max_bytes} are allowed", field="body")
    return Request(request.scope, receive)


def _refuse_unknown_parts(form: FormData, known: tuple[str, ...]) -> None:
    for name in form:
        if name not in known:
            raise InvalidRequest(f"{name[:60]}: not a known part, allowed are {', '.join(known)}", field=name[:60])
        if len(form.getlist(name)) > 1:
            raise InvalidRequest(f"{name}: the part is given more than once", field=name)


async def _file_part(form: FormData, name: str) -> bytes:
    part = form.get(name)
    if part is None:
        raise InvalidRequest(f"{name}: the part is missing, send an image file (curl: -F {name}=@input.jpg)", field=name)
    if not isinstance(part, UploadFile):
        raise InvalidRequest(f"{name}: must be a file, not text (curl: -F {name}=@input.jpg)", field=name)
    return await part.read()


async def _data_part(form: FormData) -> bytes | str:
    part = form.get("data")
    if part is None:
        raise InvalidRequest('data: the part is missing, send JSON (curl: -F data=\'{"prompt":"a red circle"}\')', field="data")
    if isinstance(part, UploadFile):
        if part.size is not None and part.size > _MAX_JSON_BYTES:
            raise TooLarge(f"data: at most {_MAX_JSON_BYTES} bytes are allowed", field="data")
        return await part.read()
    return part


def _fitted_inputs(files: dict[str, bytes], parameters: GenerationRequest, model: ModelFolder) -> tuple[Image.Image, Image.Image | None]:
    """The picture, and the mask if there is one, decoded and at the size that will be drawn. Takes up to a second."""
    picture = images.read_picture(files["img"], "img")
    native = model.native_width, model.native_height
    size = images.output_size(picture.size, native, parameters.width, parameters.height)
    mask = None
    if "mask" in files:
        mask = images.fit(images.scale_mask(images.read_mask(files["mask"], "mask"), picture.size, "mask"), *size)
    return images.fit(picture, *size), mask


def _task(
    kind: Kind,
    parameters: GenerationRequest,
    size: tuple[int, int],
    model: ModelFolder,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
) -> Task:
    """The request with everything resolved that was left open."""
    return Task(
        kind=kind,
        prompt=parameters.prompt,
        negative_prompt=parameters.negative_prompt,
        width=size[0],
        height=size[1],
        num_inference_steps=parameters.num_inference_steps,
        guidance_scale=parameters.guidance_scale,
        guidance_end=parameters.guidance_end,
        preview_every_steps=parameters.preview_every_steps,
        seed=random_seed() if parameters.seed is None else parameters.seed,
        scheduler=parameters.scheduler or model.scheduler,
        safety_check=parameters.safety_check,
        strength=parameters.strength if isinstance(parameters, ImageToImageRequest) else 1.0,
        image=image,
        mask=mask,
    )


# --- answering -------------------------------------------------------------------------------------


async def _answer(request: Request, runner: bentoml.Runner, model: ModelFolder, task: Task, parameters: GenerationRequest) -> Response:
    accepted = _accepted(",".join(request.headers.getlist("accept")) or "*/*")
    if accepted.events:
        pieces = _events(runner, model, task, parameters.output_format or accepted.image_format or "jpeg")
        return StreamingResponse(events.kept_alive(pieces), media_type=events.MEDIA_TYPE, headers=events.HEADERS)
    if task.preview_every_steps:
        raise InvalidRequest("preview_every_steps: previews need Accept: text/event-stream", field="preview_every_steps")
    image_format = parameters.output_format or accepted.image_format
    if image_format is None:
        raise NotAcceptable(f"Accept allows none of {', '.join((*MEDIA_TYPES.values(), events.MEDIA_TYPE))}", field="Accept")
    picture = await _while_connected(request, draw(runner, task))
    content = await run_in_threadpool(encoded, task, picture, image_format)
    headers = parameter_headers(task, picture, model)
    headers["content-disposition"] = f'inline; filename="{task.kind}-{task.seed}.{image_format}"'
    return Response(content, media_type=MEDIA_TYPES[image_format], headers=headers)


async def _events(runner: bentoml.Runner, model: ModelFolder, task: Task, image_format: ImageFormat) -> AsyncGenerator[bytes, None]:
    """queued, progress and preview while it is being drawn, then completed with the picture, or error."""
    try:
        async with aclosing(news_of(runner, task, follow=True)) as news:
            async for one in news:
                if isinstance(one, Progress):
                    yield _progress_event(one)
                    if one.preview is not None:
                        yield await run_in_threadpool(_preview_event, one.step, one.preview, (task.width, task.height))
                else:
                    content = await run_in_threadpool(encoded, task, one, image_format)
                    yield events.event("completed", {**_as_data(content, image_format), "parameters": parameters_of(task, one, model)})
    except Exception as error:
        known = known_error(error, f"The stream of events of a {task.kind}")
        yield events.event("error", error_body(known.type, known.message, known.problems))


def _preview_event(step: int, preview: Image.Image, size: tuple[int, int]) -> bytes:
    content = images.encode(preview.resize(size, Image.Resampling.BICUBIC), "jpeg")
    return events.event("preview", {"step": step, **_as_data(content, "jpeg")})


def _as_data(content: bytes, image_format: ImageFormat) -> dict[str, str]:
    return {"media_type": MEDIA_TYPES[image_format], "image": base64.b64encode(content).decode("ascii")}


def _progress_event(progress: Progress) -> bytes:
    seconds_left = round(progress.seconds_left, 1)
    if progress.position:
        return events.event("queued", {"position": progress.position, "seconds_left": seconds_left})
    return events.event("progress", {"step": progress.step, "steps": progress.steps, "seconds_left": seconds_left})


@dataclass(frozen=True)
class _Accepted:
    """What the client takes: events, if it names them, and the image type that it likes best, if there is one."""

    events: bool
    image_format: ImageFormat | None


def _accepted(accept: str) -> _Accepted:
    """RFC 9110, 12.5.1. A client that does not mind gets jpeg."""
    formats: dict[str, ImageFormat] = {name: image_format for image_format, name in MEDIA_TYPES.items()}
    formats |= {"*/*": "jpeg", "image/*": "jpeg", "": "jpeg"}
    liked: list[tuple[float, str]] = []
    for entry in accept.split(","):
        media_type, *options = (part.strip().lower() for part in entry.split(";"))
        quality = next((option[2:] for option in options if option.startswith("q=")), "1")
        try:
            weight = float(quality)
        except ValueError:
            weight = 0.0
        if weight > 0:
            liked.append((weight, media_type))
    images_liked = [entry for entry in liked if entry[1] in formats]
    return _Accepted(
        events=any(media_type == events.MEDIA_TYPE for _, media_type in liked),
        # max gives the first one among equals.
        image_format=formats[max(images_liked, key=lambda entry: entry[0])[1]] if images_liked else None,
    )


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` until it is done or the client has gone: then cancel it and raise ClientGone."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone("the client closed the connection")
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue
