"""From a task to its response: the image, server-sent events, or an asynchronous job with its description.

The native API, /reproduce and /jobs share this.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stable_diffusion.api.context import Context
from stable_diffusion.api.event_ids import ENDED, EventId, event_id_of, preview_id
from stable_diffusion.api.job import CompletedJobEvent, description, is_ended, is_estimated, progress_of
from stable_diffusion.api.responses import (
    EventStream,
    completed_event,
    error_event,
    followed_headers,
    image_response,
    known_error,
    preview_event,
    progress_event,
)
from stable_diffusion.core import journal
from stable_diffusion.core.errors import InvalidRequest, JobsUnavailable, NotAcceptable, ServiceError
from stable_diffusion.core.requests import GenerationRequest
from stable_diffusion.core.types import GeneratedImage, ImageFormat, Progress, Task
from stable_diffusion.images.encode import MEDIA_TYPES
from stable_diffusion.runner.client import Updates, begin, follow, generate, generate_all, generate_asynchronously
from stable_diffusion.state.job_record import JobRecord, fingerprint
from stable_diffusion.web import sse
from stable_diffusion.web.disconnect import while_connected
from stable_diffusion.web.headers import delivery_of, rename_job, ticket_of

_RETRY_AFTER_S = 1


def accepted_response(records: Sequence[JobRecord]) -> Response:
    """202: the job is running; the response names its address."""
    headers = {"Location": f"/jobs/{records[0].id}", "Retry-After": str(_RETRY_AFTER_S)}
    return JSONResponse(description(records), 202, headers | followed_headers())


async def _awaited_image(context: Context, job_id: str, image_format: ImageFormat, note_end: journal.NoteEnd) -> Response:
    """Wait for the image of an asynchronous job and return it."""
    last = await _ended(context, job_id)
    response = await run_in_threadpool(kept_image_response, context, last[0], image_format)
    await note_fetched(context, last[0])
    response.headers.update(followed_headers())
    note_end(*_end_of(last))
    return response


def kept_image_response(context: Context, record: JobRecord, image_format: ImageFormat) -> Response:
    return image_response(record.task, record.finished(), context.model(), image_format)


async def note_fetched(context: Context, record: JobRecord) -> None:
    """Note that a client has fetched the image. If that fails, the image is sent all the same."""
    with suppress(JobsUnavailable):
        await run_in_threadpool(context.jobs.note_fetched, record.id)


def _ignore_end(error: ServiceError | None, flagged: bool | None) -> None:
    """Used for requests that only query a job: their log line does not show the job's end."""


_STREAM = "The event stream of a job"


async def events_of(
    context: Context,
    job_id: str,
    image_format: ImageFormat,
    note_end: journal.NoteEnd = _ignore_end,
    seen: EventId | None = None,
) -> AsyncGenerator[bytes, None]:
    """The events of a job from now on, or from what the client has `seen`. The event `completed` contains the image only if it is kept.

    An event says where the job stands, so of several that were missed only the last is sent. If the job's state cannot be read, the last
    event is an error without an id: the job goes on. `note_end` is called before the last event is sent, because the client may then
    close the connection.
    """
    yield sse.RETRY
    try:
        async with aclosing(follow(context.client, job_id)) as standings:
            async for records in standings:
                if is_ended(records):
                    last = await run_in_threadpool(_last_event, context, records, image_format)
                    note_end(*_end_of(records))
                    yield last
                    if records[0].image is not None:
                        await note_fetched(context, records[0])
                elif is_estimated(records):
                    if (now := event_id_of(records, seen.preview if seen else "")) != seen:
                        yield progress_event(progress_of(records), now.attempt, str(now))
                        seen = now
                    png = records[0].preview_png
                    if png is not None and (preview := preview_id(png)) != now.preview:
                        seen = replace(now, preview=preview)
                        yield await run_in_threadpool(_preview_event, records[0], str(seen))
    except Exception as error:
        known = known_error(error, _STREAM)
        note_end(known, None)
        yield error_event(known, _STREAM)


def _last_event(context: Context, records: Sequence[JobRecord], image_format: ImageFormat) -> bytes:
    if (error := _end_of(records)[0]) is not None:
        return error_event(error, _STREAM, ENDED)
    if (first := records[0]).image is None:
        return sse.event("completed", CompletedJobEvent(job=description(records)), ENDED)
    return completed_event(first.task, first.finished(), context.model(), image_format, event_id=ENDED)


def _end_of(records: Sequence[JobRecord]) -> tuple[ServiceError | None, bool | None]:
    """The job's error, or None and whether its image is flagged."""
    error = next((record.error for record in records if record.error is not None), None)
    return error, None if error is not None else records[0].outcome.get("flagged")


def _preview_event(record: JobRecord, event_id: str) -> bytes:
    assert record.preview is not None
    return preview_event(record.progress.step, record.preview, record.task, event_id)


Remarks = Callable[[GeneratedImage], dict[str, Any]]


def _no_remarks(_: GeneratedImage) -> dict[str, Any]:
    return {}


async def respond(
    request: Request,
    context: Context,
    task: Task,
    parameters: GenerationRequest,
    remarks: Remarks = _no_remarks,
) -> Response:
    """Generate `task` and respond as the client asked: with the image, with events, or with 202 and the job's address.

    `remarks` returns additional values to send beside the parameters; images of asynchronous jobs are sent without them.
    """
    ticket, delivery = ticket_of(request), delivery_of(request)
    image_format = parameters.output_format or delivery.image_format
    if task.preview_every_steps and not (delivery.events or delivery.asynchronous):
        raise InvalidRequest("preview_every_steps: previews need Accept: text/event-stream", field="preview_every_steps")
    if image_format is None and not (delivery.events or delivery.asynchronous):
        raise NotAcceptable(f"Accept allows none of {', '.join((*MEDIA_TYPES.values(), sse.MEDIA_TYPE))}", field="Accept")
    if delivery.asynchronous or delivery.idempotency_key is not None:
        job_id = await _accept(request, context, [task], delivery.idempotency_key, parameters.seed, parameters.output_format)
        if delivery.asynchronous:
            accepted_job = accepted_response(await run_in_threadpool(context.jobs.get, job_id))
            accepted_job.headers["Preference-Applied"] = "respond-async"
            return accepted_job
        if delivery.events:
            return EventStream(_events_of_job(context, job_id, image_format or "jpeg"))
        assert image_format is not None
        return await while_connected(request, _image_of_job(context, job_id, image_format))
    if delivery.events:
        updates = await while_connected(request, begin(context.client, task, ticket, follow=True))
        return EventStream(_events(updates, context, task, image_format or "jpeg", remarks))
    assert image_format is not None
    image = await while_connected(request, generate(context.client, task, ticket))
    return await run_in_threadpool(image_response, task, image, context.model(), image_format, remarks(image))


async def _accept(
    request: Request, context: Context, tasks: Sequence[Task], key: str | None, seed: int | None, image_format: ImageFormat | None
) -> str:
    """Start an asynchronous job and return its id; with an idempotency key that was used before, the id of the earlier job."""
    ticket = replace(ticket_of(request), asynchronous=True)
    request_fingerprint = await run_in_threadpool(fingerprint, request.url.path, tasks, seed)
    job_id = await run_in_threadpool(context.jobs.accept, ticket, tasks, key, request_fingerprint, image_format)
    if job_id == ticket.job_id and context.client.queue is None:
        await generate_asynchronously(context.client, tasks, ticket)
    elif job_id == ticket.job_id:
        journal.note_accepted(tasks)
        context.client.may_take.set()
    rename_job(request, job_id)
    return job_id


async def generate_once(
    request: Request, context: Context, tasks: Sequence[Task], seed: int | None
) -> tuple[Sequence[Task], Sequence[GeneratedImage]]:
    """The images of `tasks`, for APIs that respond when all are finished. `seed`: of the first image, as requested.

    With Idempotency-Key, a request that is sent again gets the job of the first, and its tasks. Raises InvalidRequest for
    Prefer: respond-async, which these APIs do not offer.
    """
    key = waiting_key(request)
    if key is None:
        images = await while_connected(request, generate_all(context.client, tasks, ticket_of(request)))
        return tasks, images
    job_id = await _accept(request, context, tasks, key, seed, None)
    with journal.waiting_for_job() as note_end:
        records = await while_connected(request, _ended(context, job_id))
        images = await run_in_threadpool(lambda: [record.finished() for record in records])
        await note_fetched(context, records[0])
        note_end(*_end_of(records))
    return [record.task for record in records], images


def waiting_key(request: Request) -> str | None:
    """The Idempotency-Key of a request to an API that always waits for its images. Raises InvalidRequest for Prefer: respond-async."""
    delivery = delivery_of(request)
    if delivery.asynchronous:
        raise InvalidRequest(
            "Prefer: respond-async is offered by /txt2img, /img2img, /inpaint and /reproduce; this API responds when the images are "
            "finished, omit the header",
            field="Prefer",
        )
    return delivery.idempotency_key


async def _ended(context: Context, job_id: str) -> list[JobRecord]:
    last: list[JobRecord] = []
    async with aclosing(follow(context.client, job_id)) as standings:
        async for records in standings:
            last = records
    return last


async def _image_of_job(context: Context, job_id: str, image_format: ImageFormat) -> Response:
    with journal.waiting_for_job() as note_end:
        return await _awaited_image(context, job_id, image_format, note_end)


async def _events_of_job(context: Context, job_id: str, image_format: ImageFormat) -> AsyncGenerator[bytes, None]:
    with journal.waiting_for_job() as note_end:
        async with aclosing(events_of(context, job_id, image_format, note_end)) as pieces:
            async for piece in pieces:
                yield piece


async def _events(
    updates: Updates, context: Context, task: Task, image_format: ImageFormat, remarks: Remarks
) -> AsyncGenerator[bytes, None]:
    """The events queued, progress and preview while the task runs, then completed with the image, or error."""
    try:
        async with aclosing(updates):
            async for one in updates:
                if isinstance(one, Progress):
                    yield progress_event(one)
                    if one.preview is not None:
                        yield await run_in_threadpool(preview_event, one.step, one.preview, task)
                elif isinstance(one, GeneratedImage):
                    yield await run_in_threadpool(completed_event, task, one, context.model(), image_format, remarks(one))
    except Exception as error:
        yield error_event(error, f"The event stream of a {task.kind}")
