"""The native API: /txt2img, /img2img and /inpaint take a request and return an image or its events."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stable_diffusion.api.context import Context
from stable_diffusion.api.deliver import respond
from stable_diffusion.api.responses import with_error_responses
from stable_diffusion.api.tasks import image_task, text_task
from stable_diffusion.core.errors import InvalidRequest
from stable_diffusion.core.requests import ImageToImageRequest, parse_image_to_image, parse_text_to_image
from stable_diffusion.core.types import Task
from stable_diffusion.images.decode import read_image, read_mask
from stable_diffusion.web.body import parse_json, read_json_body, read_parts, within_upload_budget
from stable_diffusion.web.decode_queue import decoded


def make_routes(context: Context) -> list[Route]:
    async def txt2img(request: Request) -> Response:
        with within_upload_budget(request, context.uploads) as uploading:
            parameters = parse_text_to_image(await read_json_body(uploading))
        task = await run_in_threadpool(text_task, parameters, context.served())
        return await respond(request, context, task, parameters)

    async def img2img(request: Request) -> Response:
        return await respond(request, context, *await _read_image_task(request, context, "img"))

    async def inpaint(request: Request) -> Response:
        return await respond(request, context, *await _read_image_task(request, context, "img", "mask"))

    endpoints = {"/txt2img": txt2img, "/img2img": img2img, "/inpaint": inpaint}
    return [Route(path, with_error_responses(endpoint), methods=["POST"]) for path, endpoint in endpoints.items()]


async def _read_image_task(request: Request, context: Context, *names: str) -> tuple[Task, ImageToImageRequest]:
    """Read the upload, which is released on return: nothing holds it while the image waits and is generated."""
    with within_upload_budget(request, context.uploads) as uploading:
        parameters, files = await _read_form(uploading, *names)
        served = context.served()

        def work() -> Task:
            image = read_image(files["img"], "img")
            mask = read_mask(files["mask"], "mask") if "mask" in files else None
            return image_task(parameters, served, image, mask)

        return await decoded(request, context.decoding, work), parameters


async def _read_form(request: Request, *names: str) -> tuple[ImageToImageRequest, dict[str, bytes]]:
    """The validated `data` part and the bytes of the named file parts."""
    contents, data = await read_parts(request, names, ())
    if data is None:
        raise InvalidRequest('data: the part is missing, send JSON (curl: -F data=\'{"prompt":"a red circle"}\')', field="data")
    return parse_image_to_image(parse_json(data, "data")), contents
