"""OpenAI's images API: its paths. It generates the same images as the native API.

`parameters.py` validates, `responses.py` has the forms of responses; the model's limits are those of the request models.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Literal

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stable_diffusion.api.context import Context
from stable_diffusion.api.deliver import generate_once, waiting_key
from stable_diffusion.api.openai.parameters import OpenaiParameters, parse_edit, parse_generation, read_texts
from stable_diffusion.api.openai.responses import (
    completed_event,
    error_event,
    error_response,
    images_response,
    models_response,
    partial_image_event,
)
from stable_diffusion.api.responses import EventStream, known_error, with_error_responses
from stable_diffusion.api.tasks import consecutive_tasks, image_task, text_task, with_previews
from stable_diffusion.core.errors import InvalidRequest, ModelNotFound
from stable_diffusion.core.types import GeneratedImage, Progress, Task
from stable_diffusion.images.decode import read_image, read_transparency_as_mask
from stable_diffusion.runner.client import Updates, begin
from stable_diffusion.web.body import file_part, opened_form, read_json_body, within_upload_budget
from stable_diffusion.web.decode_queue import decoded
from stable_diffusion.web.disconnect import while_connected
from stable_diffusion.web.headers import ticket_of

Event = Literal["image_generation", "image_edit"]


def make_routes(context: Context) -> list[Route]:
    async def generations(request: Request) -> Response:
        with within_upload_budget(request, context.uploads) as uploading:
            asked, parameters = parse_generation(await read_json_body(uploading))
        _require_served(context, asked)
        task = await run_in_threadpool(text_task, parameters, context.served())
        return await _respond(request, context, "image_generation", task, asked, parameters.seed)

    async def edits(request: Request) -> Response:
        return await _respond(request, context, "image_edit", *await _read_edit_task(request, context))

    async def models(request: Request) -> Response:
        return JSONResponse(models_response(context.model()))

    async def model(request: Request) -> Response:
        _require_model(context, request.path_params["model_id"])
        return JSONResponse(models_response(context.model())["data"][0])

    return [
        Route("/v1/images/generations", with_error_responses(generations, error_response), methods=["POST"]),
        Route("/v1/images/edits", with_error_responses(edits, error_response), methods=["POST"]),
        Route("/v1/models", with_error_responses(models, error_response), methods=["GET"]),
        Route("/v1/models/{model_id}", with_error_responses(model, error_response), methods=["GET"]),
    ]


async def _read_edit_task(request: Request, context: Context) -> tuple[Task, OpenaiParameters, int | None]:
    """Read the upload, which is released on return: nothing holds it while the images wait and are generated."""
    with within_upload_budget(request, context.uploads) as uploading:
        texts, content, mask_content = await _read_edit(uploading)
        asked, parameters = parse_edit(read_texts(texts))
        _require_served(context, asked)

        def work() -> Task:
            image = read_image(content, "image")
            mask = None if mask_content is None else _mask_for(image, mask_content)
            return image_task(parameters, context.served(), image, mask)

        return await decoded(request, context.decoding, work), asked, parameters.seed


async def _read_edit(request: Request) -> tuple[dict[str, str], bytes, bytes | None]:
    """The text fields, the image and the mask, if there is one."""
    async with opened_form(request, max_images=2, max_parts=64) as form:
        count = len(form.getlist("image")) + len(form.getlist("image[]"))
        if count > 1:
            raise InvalidRequest(f"image: exactly one can be edited, got {count}", field="image")
        content = await file_part(form, "image[]" if "image[]" in form else "image")
        if len(form.getlist("mask")) > 1:
            raise InvalidRequest("mask: is given more than once", field="mask")
        mask = await file_part(form, "mask") if "mask" in form else None
        return _texts(form), content, mask


def _texts(form: FormData) -> dict[str, str]:
    texts: dict[str, str] = {}
    for name, value in form.multi_items():
        if name in ("image", "image[]", "mask"):
            continue
        if name in texts:
            raise InvalidRequest(f"{name[:60]}: is given more than once", field=name[:60])
        if not isinstance(value, str):
            raise InvalidRequest(f"{name[:60]}: must be text, not a file", field=name[:60])
        texts[name] = value
    return texts


def _mask_for(image: Image.Image, content: bytes) -> Image.Image:
    mask = read_transparency_as_mask(content, "mask")
    if mask.size != image.size:
        raise InvalidRequest(
            f"mask: must have the image's size, {image.width} x {image.height}, got {mask.width} x {mask.height}", field="mask"
        )
    return mask


def _require_served(context: Context, asked: OpenaiParameters) -> None:
    if asked.model:
        _require_model(context, asked.model)


def _require_model(context: Context, name: str) -> None:
    served = context.model().name
    if name != served:
        raise ModelNotFound(f"model: there is no model {name[:60]!r}, this server has only {served!r}", field="model")


async def _respond(request: Request, context: Context, event: Event, task: Task, asked: OpenaiParameters, seed: int | None) -> Response:
    if asked.stream:
        if waiting_key(request) is not None:
            raise InvalidRequest("Idempotency-Key: cannot be combined with stream: true, omit one of them", field="Idempotency-Key")
        task = with_previews(task, _steps_between(asked.partial_images, task), context.policy())
        updates = await while_connected(request, begin(context.client, task, ticket_of(request), follow=asked.partial_images > 0))
        return EventStream(_events(updates, context, event, task, asked))
    tasks, images = await generate_once(request, context, consecutive_tasks(task, asked.n, context.model()), seed)
    return await run_in_threadpool(lambda: JSONResponse(images_response(tasks, images, context.model(), asked)))


async def _events(updates: Updates, context: Context, event: Event, task: Task, asked: OpenaiParameters) -> AsyncGenerator[bytes, None]:
    """The events partial_image, as often as requested, then completed, or error, which the official clients raise."""
    sent = 0
    try:
        async with aclosing(updates):
            async for one in updates:
                # The last steps may yield one preview more than requested.
                if isinstance(one, Progress) and one.preview is not None and sent < asked.partial_images:
                    yield await run_in_threadpool(partial_image_event, f"{event}.partial_image", task, one.preview, sent, asked)
                    sent += 1
                elif isinstance(one, GeneratedImage):
                    yield await run_in_threadpool(completed_event, f"{event}.completed", task, one, context.model(), asked)
    except Exception as error:
        yield error_event(known_error(error, f"The event stream of an {event}"))


def _steps_between(partial_images: int, task: Task) -> int:
    """The number of steps between previews that spreads them evenly over all steps; 0: no previews.

    With a noise scheduler that calls the UNet twice for most steps (Heun), all previews fall into the first half.
    """
    if not partial_images:
        return 0
    return max(1, int(task.num_inference_steps * task.strength) // (partial_images + 1))
