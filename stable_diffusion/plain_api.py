"""The plain endpoints: a request in, the picture out, or what happens until it is there as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stable_diffusion import events, images, request_log
from stable_diffusion.answers import (
    answering_errors,
    completed_event,
    error_event,
    event_stream,
    picture_answer,
    preview_event,
    progress_event,
)
from stable_diffusion.backend import Backend
from stable_diffusion.drawing import News, begin, draw, draw_unattended
from stable_diffusion.engine.job import Picture, Progress, Task
from stable_diffusion.errors import InvalidRequest, NotAcceptable, ServiceError
from stable_diffusion.images import MEDIA_TYPES, ImageFormat
from stable_diffusion.jobs import Ticket, fingerprint
from stable_diffusion.jobs_api import accepted_answer, awaited_picture, events_of
from stable_diffusion.reading import (
    accepted_types,
    counted,
    decoded,
    idempotency_key,
    prefers_no_waiting,
    read_form,
    read_json_body,
    rename_job,
    ticket_of,
    while_connected,
)
from stable_diffusion.requests import GenerationRequest, ImageToImageRequest, parse_text_to_image
from stable_diffusion.tasks import image_task, text_task


def routes(backend: Backend) -> list[Route]:
    async def txt2img(request: Request) -> Response:
        with counted(request, backend.uploads) as uploading:
            parameters = parse_text_to_image(await read_json_body(uploading))
        return await answer(request, backend, text_task(parameters, backend.model(), backend.policy()), parameters)

    async def img2img(request: Request) -> Response:
        return await answer(request, backend, *await _read_image_task(request, backend, "img"))

    async def inpaint(request: Request) -> Response:
        return await answer(request, backend, *await _read_image_task(request, backend, "img", "mask"))

    endpoints = {"/txt2img": txt2img, "/img2img": img2img, "/inpaint": inpaint}
    return [Route(path, answering_errors(endpoint), methods=["POST"]) for path, endpoint in endpoints.items()]


async def _read_image_task(request: Request, backend: Backend, *names: str) -> tuple[Task, ImageToImageRequest]:
    """What was uploaded ends with this call: nothing keeps it while the picture waits and is drawn."""
    with counted(request, backend.uploads) as uploading:
        parameters, files = await read_form(uploading, *names)
        model, policy = backend.model(), backend.policy()

        def work() -> Task:
            picture = images.read_picture(files["img"], "img")
            mask = images.read_mask(files["mask"], "mask") if "mask" in files else None
            return image_task(parameters, model, policy, picture, mask)

        return await decoded(request, backend.decoding, work), parameters


Remarks = Callable[[Picture], dict[str, Any]]


def _no_remarks(_: Picture) -> dict[str, Any]:
    return {}


async def answer(
    request: Request,
    backend: Backend,
    task: Task,
    parameters: GenerationRequest,
    remarks: Remarks = _no_remarks,
) -> Response:
    """Have `task` drawn and answer as the client asked: at once, with events, or with the place where the picture will be.

    `remarks` has what is told beside the parameters of a picture that is not kept.
    """
    accepted, ticket = accepted_types(request), ticket_of(request)
    image_format = parameters.output_format or accepted.image_format
    key, is_asynchronous = idempotency_key(request), prefers_no_waiting(request)
    if task.preview_every_steps and not (accepted.events or is_asynchronous):
        raise InvalidRequest("preview_every_steps: previews need Accept: text/event-stream", field="preview_every_steps")
    if image_format is None and not (accepted.events or is_asynchronous):
        raise NotAcceptable(f"Accept allows none of {', '.join((*MEDIA_TYPES.values(), events.MEDIA_TYPE))}", field="Accept")
    if is_asynchronous or key is not None:
        job_id = await _accept(backend, task, replace(ticket, unattended=True), key, parameters)
        rename_job(request, job_id)
        if is_asynchronous:
            accepted_job = accepted_answer(await run_in_threadpool(backend.jobs.get, job_id))
            accepted_job.headers["Preference-Applied"] = "respond-async"
            return accepted_job
        if accepted.events:
            return event_stream(_events_of_job(backend, job_id, image_format or "jpeg"))
        assert image_format is not None
        return await while_connected(request, _picture_of_job(backend, job_id, image_format))
    if accepted.events:
        news = await while_connected(request, begin(backend, task, ticket, follow=True))
        return event_stream(_events(news, backend, task, image_format or "jpeg", remarks))
    assert image_format is not None
    picture = await while_connected(request, draw(backend, task, ticket))
    return await run_in_threadpool(picture_answer, task, picture, backend.model(), image_format, remarks(picture))


async def _accept(backend: Backend, task: Task, ticket: Ticket, key: str | None, parameters: GenerationRequest) -> str:
    """A job that is drawn to its end, whether anybody waits or not; with a key that was used before, the job of that time."""
    what = await run_in_threadpool(fingerprint, task, parameters.seed)
    job_id = await run_in_threadpool(backend.jobs.accept, ticket, task, key, what, parameters.output_format)
    if job_id == ticket.job_id:
        await draw_unattended(backend, task, ticket)
    return job_id


async def _picture_of_job(backend: Backend, job_id: str, image_format: ImageFormat) -> Response:
    with request_log.waiting_for_job() as note_end:
        answered = await awaited_picture(backend, job_id, image_format)
        note_end(*await _end_of(backend, job_id))
        return answered


async def _events_of_job(backend: Backend, job_id: str, image_format: ImageFormat) -> AsyncGenerator[bytes, None]:
    with request_log.waiting_for_job() as note_end:
        async with aclosing(events_of(backend, job_id, image_format)) as pieces:
            async for piece in pieces:
                if piece.startswith(_LAST_EVENTS):  # the client may close when it has that
                    note_end(*await _end_of(backend, job_id))
                yield piece


_LAST_EVENTS = (b"event: completed\n", b"event: error\n")


async def _end_of(backend: Backend, job_id: str) -> tuple[ServiceError | None, bool | None]:
    """A job's error, and without one whether its picture is flagged."""
    try:
        record = (await run_in_threadpool(backend.jobs.get, job_id))[0]
    except ServiceError as error:
        return error, None
    return record.error, record.outcome.get("flagged")


async def _events(news: News, backend: Backend, task: Task, image_format: ImageFormat, remarks: Remarks) -> AsyncGenerator[bytes, None]:
    """queued, progress and preview while it is being drawn, then completed with the picture, or error."""
    try:
        async with aclosing(news):
            async for one in news:
                if isinstance(one, Progress):
                    yield progress_event(one)
                    if one.preview is not None:
                        yield await run_in_threadpool(preview_event, one.step, one.preview, task)
                elif isinstance(one, Picture):
                    yield await run_in_threadpool(completed_event, task, one, backend.model(), image_format, remarks(one))
    except Exception as error:
        yield error_event(error, f"The stream of events of a {task.kind}")
