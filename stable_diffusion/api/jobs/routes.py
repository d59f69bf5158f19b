"""/jobs: the state of a job, its events, its image, its cancellation."""

from __future__ import annotations

import asyncio
import time

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stable_diffusion.api.context import Context
from stable_diffusion.api.deliver import accepted_response, events_of, kept_image_response, note_fetched
from stable_diffusion.api.event_ids import ENDED, read_event_id
from stable_diffusion.api.job import description, is_ended
from stable_diffusion.api.responses import EventStream, followed_headers, with_error_responses
from stable_diffusion.core.errors import NotAcceptable
from stable_diffusion.images.encode import MEDIA_TYPES
from stable_diffusion.state.job_record import JobRecord
from stable_diffusion.web.headers import accepted_types, key_name_of, owner_of
from stable_diffusion.web.sse import LAST_ID_HEADER

_CANCELLED_WITHIN_S = 2.0  # a step of a large image on a CPU takes longer


def make_routes(context: Context) -> list[Route]:
    async def job(request: Request) -> Response:
        return JSONResponse(description(await _records(request, context)), headers=followed_headers())

    async def cancel(request: Request) -> Response:
        await run_in_threadpool(context.jobs.cancel, (await _records(request, context))[0].id)
        deadline = time.monotonic() + _CANCELLED_WITHIN_S
        while not is_ended(records := await _records(request, context)) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        return JSONResponse(description(records), 200 if is_ended(records) else 202)

    async def events(request: Request) -> Response:
        records = await _records(request, context)
        last_id = request.headers.get(LAST_ID_HEADER)
        if last_id == ENDED and is_ended(records):
            return Response(status_code=204)  # a browser connects again after the end of every stream, until it gets this
        image_format = records[0].image_format or accepted_types(request).image_format or "jpeg"
        return EventStream(events_of(context, records[0].id, image_format, seen=read_event_id(last_id)))

    async def image(request: Request) -> Response:
        records = await _records(request, context)
        image_format = records[0].image_format or accepted_types(request).image_format
        if image_format is None:
            raise NotAcceptable(f"Accept allows none of {', '.join(MEDIA_TYPES.values())}", field="Accept")
        if not is_ended(records):
            return accepted_response(records)
        response = await run_in_threadpool(kept_image_response, context, records[0], image_format)
        if request.method != "HEAD":
            await note_fetched(context, records[0])
        return response

    follow_events = Route("/jobs/{job_id}/events", with_error_responses(events), methods=["GET"])
    follow_events.methods = {"GET"}  # without HEAD, which would wait silently for the job's end
    return [
        Route("/jobs/{job_id}", with_error_responses(job), methods=["GET"]),
        Route("/jobs/{job_id}", with_error_responses(cancel), methods=["DELETE"]),
        follow_events,
        Route("/jobs/{job_id}/picture", with_error_responses(image), methods=["GET"]),
    ]


async def _records(request: Request, context: Context) -> list[JobRecord]:
    """The records of the job in the path. With API keys only its own key may ask; without, any client that knows the id."""
    owner = owner_of(request) if key_name_of(request) is not None else None
    return await run_in_threadpool(context.jobs.get, request.path_params["job_id"], owner)
