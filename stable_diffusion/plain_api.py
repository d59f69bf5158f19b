"""The plain endpoints: a request in, the picture out, or what happens until it is there as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from stable_diffusion import events, images
from stable_diffusion.answers import answering_errors, as_data, error_body, known_error, parameter_headers, parameters_of, progress_event
from stable_diffusion.backend import Backend
from stable_diffusion.drawing import draw, news_of
from stable_diffusion.engine.job import Progress, Task
from stable_diffusion.errors import InvalidRequest, NotAcceptable
from stable_diffusion.images import MEDIA_TYPES, ImageFormat
from stable_diffusion.reading import accepted_types, read_form, read_json_body, while_connected
from stable_diffusion.requests import GenerationRequest, parse_text_to_image
from stable_diffusion.tasks import image_task, text_task


def routes(backend: Backend) -> list[Route]:
    async def txt2img(request: Request) -> Response:
        parameters = parse_text_to_image(await read_json_body(request))
        return await _answer(request, backend, text_task(parameters, backend.model()), parameters)

    async def img2img(request: Request) -> Response:
        parameters, files = await read_form(request, "img")
        model = backend.model()
        task = await backend.decode(lambda: image_task(parameters, model, images.read_picture(files["img"], "img")))
        return await _answer(request, backend, task, parameters)

    async def inpaint(request: Request) -> Response:
        parameters, files = await read_form(request, "img", "mask")
        model = backend.model()
        task = await backend.decode(
            lambda: image_task(parameters, model, images.read_picture(files["img"], "img"), images.read_mask(files["mask"], "mask"))
        )
        return await _answer(request, backend, task, parameters)

    endpoints = {"/txt2img": txt2img, "/img2img": img2img, "/inpaint": inpaint}
    return [Route(path, answering_errors(endpoint), methods=["POST"]) for path, endpoint in endpoints.items()]


async def _answer(request: Request, backend: Backend, task: Task, parameters: GenerationRequest) -> Response:
    accepted = accepted_types(request)
    if accepted.events:
        pieces = _events(backend, task, parameters.output_format or accepted.image_format or "jpeg")
        return StreamingResponse(events.kept_alive(pieces), media_type=events.MEDIA_TYPE, headers=events.HEADERS)
    if task.preview_every_steps:
        raise InvalidRequest("preview_every_steps: previews need Accept: text/event-stream", field="preview_every_steps")
    image_format = parameters.output_format or accepted.image_format
    if image_format is None:
        raise NotAcceptable(f"Accept allows none of {', '.join((*MEDIA_TYPES.values(), events.MEDIA_TYPE))}", field="Accept")
    picture = await while_connected(request, draw(backend.runner, task))
    content = await run_in_threadpool(images.encode, picture.image, image_format)
    headers = parameter_headers(task, picture, backend.model())
    headers["content-disposition"] = f'inline; filename="{task.kind}-{task.seed}.{image_format}"'
    return Response(content, media_type=MEDIA_TYPES[image_format], headers=headers)


async def _events(backend: Backend, task: Task, image_format: ImageFormat) -> AsyncGenerator[bytes, None]:
    """queued, progress and preview while it is being drawn, then completed with the picture, or error."""
    try:
        async with aclosing(news_of(backend.runner, task, follow=True)) as news:
            async for one in news:
                if isinstance(one, Progress):
                    yield progress_event(one)
                    if one.preview is not None:
                        content = await run_in_threadpool(images.encode_preview, one.preview, (task.width, task.height))
                        yield events.event("preview", {"step": one.step, **as_data(content, "jpeg")})
                else:
                    content = await run_in_threadpool(images.encode, one.image, image_format)
                    parameters = parameters_of(task, one, backend.model())
                    yield events.event("completed", {**as_data(content, image_format), "parameters": parameters})
    except Exception as error:
        known = known_error(error, f"The stream of events of a {task.kind}")
        yield events.event("error", error_body(known.type, known.message, known.problems))
