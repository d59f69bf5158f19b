"""A1111's API: /sdapi/v1/txt2img and img2img, the options, and the lists that clients request at start."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stable_diffusion.api.a1111.images import read_infotext, read_initial_image, read_inpainting_mask, resize, unchanged_image
from stable_diffusion.api.a1111.parameters import (
    MAX_NAMES,
    GenerationBody,
    ImageToImageBody,
    Options,
    asked_seed,
    fitted_to_model,
    in_a1111_words,
    read_image_to_image,
    read_options,
    read_png_info,
    read_text_to_image,
    without_images,
)
from stable_diffusion.api.a1111.responses import (
    EMPTY_LISTS,
    UPSCALERS,
    embeddings_response,
    error_response,
    images_response,
    json_response,
    loras_response,
    models_response,
    options_response,
    png_info_response,
    progress_response,
    samplers_response,
    schedules_response,
    vaes_response,
)
from stable_diffusion.api.context import Context, Served
from stable_diffusion.api.deliver import generate_once
from stable_diffusion.api.responses import with_error_responses
from stable_diffusion.api.tasks import consecutive_tasks, image_task, text_task
from stable_diffusion.core.errors import NotFound
from stable_diffusion.core.types import GeneratedImage, Task
from stable_diffusion.images.decode import MAX_UPLOAD_BYTES
from stable_diffusion.images.transform import output_size
from stable_diffusion.models.folder import ModelFolder
from stable_diffusion.state.jobs import Jobs
from stable_diffusion.web.body import MAX_JSON_BYTES, json_content, parse_json, read_json_body, within_upload_budget
from stable_diffusion.web.decode_queue import decoded
from stable_diffusion.web.headers import owner_of
from stable_diffusion.web.upload_budget import UNCOUNTED_BYTES

# An image and a mask in base64 with line breaks, plus the other fields.
_MAX_IMAGES_BYTES = 2 * MAX_UPLOAD_BYTES * 3 // 2 + MAX_JSON_BYTES
_MAX_OPTIONS_BYTES = UNCOUNTED_BYTES


def make_routes(context: Context) -> list[Route]:
    async def txt2img(request: Request) -> Response:
        with within_upload_budget(request, context.uploads) as uploading:
            asked = read_text_to_image(await read_json_body(uploading, max_names=MAX_NAMES))
        await run_in_threadpool(require_served, asked.body.override_settings, context.model())
        served = context.served()
        asked = fitted_to_model(asked, served.model)
        task = await run_in_threadpool(in_a1111_words, lambda: text_task(asked.parameters, served))
        return await _respond(request, context, asked.body, task, asked.count)

    async def img2img(request: Request) -> Response:
        return await _respond(request, context, *await _read_image_tasks(request, context))

    async def options(request: Request) -> Response:
        return json_response(options_response(context.model()))

    async def set_options(request: Request) -> Response:
        asked = read_options(await read_json_body(request, max_bytes=_MAX_OPTIONS_BYTES, max_names=MAX_NAMES))
        await run_in_threadpool(require_served, asked, context.model())
        return json_response(None)

    async def models(request: Request) -> Response:
        return json_response(await run_in_threadpool(models_response, context.model()))

    async def vaes(request: Request) -> Response:
        return json_response(vaes_response(context.model()))

    async def progress(request: Request) -> Response:
        return json_response(progress_response(await run_in_threadpool(context.jobs.of_owner, owner_of(request))))

    async def skip(request: Request) -> Response:
        await run_in_threadpool(_cancel_oldest, context.jobs, owner_of(request))
        return json_response({})

    async def png_info(request: Request) -> Response:
        with within_upload_budget(request, context.uploads) as uploading:
            asked = read_png_info(parse_json(await json_content(uploading, _MAX_IMAGES_BYTES), "body", MAX_NAMES))
            return json_response(await run_in_threadpool(lambda: png_info_response(read_infotext(asked))))

    async def interrupt(request: Request) -> Response:
        await run_in_threadpool(context.jobs.cancel_of_owner, owner_of(request))
        return json_response({})

    async def loras(request: Request) -> Response:
        return json_response(loras_response(await run_in_threadpool(context.lora_folder.look)))

    async def refresh_loras(request: Request) -> Response:
        await run_in_threadpool(context.lora_folder.look)
        return json_response(None)

    async def embeddings(request: Request) -> Response:
        return json_response(await run_in_threadpool(embeddings_response, context.model()))

    get: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/sdapi/v1/options": options,
        "/sdapi/v1/sd-models": models,
        "/sdapi/v1/sd-vae": vaes,
        "/sdapi/v1/progress": progress,
        "/sdapi/v1/loras": loras,
        "/sdapi/v1/embeddings": embeddings,
        "/sdapi/v1/samplers": _always(samplers_response()),
        "/sdapi/v1/schedulers": _always(schedules_response()),
        "/sdapi/v1/upscalers": _always(UPSCALERS),
        **{path: _always(content) for path, content in EMPTY_LISTS.items()},
    }
    post: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/sdapi/v1/txt2img": txt2img,
        "/sdapi/v1/img2img": img2img,
        "/sdapi/v1/options": set_options,
        "/sdapi/v1/interrupt": interrupt,
        "/sdapi/v1/skip": skip,
        "/sdapi/v1/png-info": png_info,
        "/sdapi/v1/refresh-checkpoints": _always(None),
        "/sdapi/v1/refresh-loras": refresh_loras,
    }
    return [
        Route(path, with_error_responses(endpoint, error_response), methods=[method])
        for method, endpoints in (("GET", get), ("POST", post))
        for path, endpoint in endpoints.items()
    ]


async def _respond(request: Request, context: Context, body: GenerationBody, task: Task, count: int) -> Response:
    # A1111's clients send prompts of any length; `info` reports the words that did not fit.
    tasks: Sequence[Task] = consecutive_tasks(replace(task, cut_prompts=True), count, context.model())
    if isinstance(body, ImageToImageBody) and body.denoising_strength == 0:
        tasks = [replace(one, strength=0.0) for one in tasks]
        images: Sequence[GeneratedImage] = [unchanged_image(one) for one in tasks]
    else:
        tasks, images = await generate_once(request, context, tasks, asked_seed(body))
    return await run_in_threadpool(lambda: json_response(images_response(body, tasks, images, context.model())))


async def _read_image_tasks(request: Request, context: Context) -> tuple[GenerationBody, Task, int]:
    """Read the upload, which is released on return: nothing holds it while the images wait and are generated."""
    with within_upload_budget(request, context.uploads) as uploading:
        content = await json_content(uploading, _MAX_IMAGES_BYTES)
        return await decoded(request, context.decoding, partial(_read_image_task, content, context.served()))


def _read_image_task(content: bytes, served: Served) -> tuple[GenerationBody, Task, int]:
    """The body, the first image's task and the number of images. Inputs are resized in A1111's mode, so `image_task` fits nothing."""
    asked = fitted_to_model(read_image_to_image(parse_json(content, "body", MAX_NAMES)), served.model)
    require_served(asked.body.override_settings, served.model)
    image = read_initial_image(asked.body)
    mask = read_inpainting_mask(asked.body, image.size)
    native = served.model.native_width, served.model.native_height
    width, height = output_size(image.size, native, asked.parameters.width, asked.parameters.height, served.model.max_side)
    parameters = asked.parameters.model_copy(update={"width": width, "height": height})
    image = resize(image, width, height, asked.body.resize_mode)
    mask = None if mask is None else resize(mask, width, height, asked.body.resize_mode)
    task = in_a1111_words(lambda: image_task(parameters, served, image, mask))
    return without_images(asked.body), task, asked.count


def require_served(options: Options, model: ModelFolder) -> None:
    """Refuse any model and autoencoder but the served ones.

    The model's name may end with the hash, as in A1111's titles; its first use takes a moment.
    """
    name = options.sd_model_checkpoint
    if name and name != model.name and name != f"{model.name} [{model.hash}]":
        raise NotFound(
            f"sd_model_checkpoint: there is no model {name[:60]!r}, this server has only {model.name!r}", field="sd_model_checkpoint"
        )
    served_vae = "None" if model.vae is None else model.vae.name
    if options.sd_vae and options.sd_vae not in ("Automatic", served_vae):
        raise NotFound(f"sd_vae: must be Automatic or {served_vae} on this server, got {options.sd_vae[:60]!r}", field="sd_vae")


def _cancel_oldest(jobs: Jobs, owner: str) -> None:
    """Cancel the caller's oldest job, for A1111's `skip`."""
    unfinished = jobs.of_owner(owner)
    if unfinished:
        jobs.cancel(unfinished[0].id)


def _always(content: Any) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        return json_response(content)

    return respond
