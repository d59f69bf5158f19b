"""Jobs by their ids: where one stands, its events, its picture, its cancellation. And the picture of a job that nobody waited for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from datetime import datetime, timezone
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stable_diffusion import events as server_sent
from stable_diffusion.answers import (
    answering_errors,
    completed_event,
    error_body,
    error_event,
    event_stream,
    followed_headers,
    picture_answer,
    preview_event,
    progress_event,
)
from stable_diffusion.backend import Backend
from stable_diffusion.drawing import follow
from stable_diffusion.engine.job import Progress
from stable_diffusion.errors import JobsUnavailable, NotAcceptable
from stable_diffusion.images import MEDIA_TYPES, ImageFormat
from stable_diffusion.jobs import JobRecord, State
from stable_diffusion.reading import accepted_types, key_name_of, owner_of

_CANCELLED_WITHIN_S = 2.0  # a step of a large picture without a GPU takes longer
_ASK_AGAIN_S = 1


def routes(backend: Backend) -> list[Route]:
    async def job(request: Request) -> Response:
        return JSONResponse(description(await _records(request, backend)), headers=followed_headers())

    async def cancel(request: Request) -> Response:
        await run_in_threadpool(backend.jobs.cancel, (await _records(request, backend))[0].id)
        deadline = time.monotonic() + _CANCELLED_WITHIN_S
        while not _is_ended(records := await _records(request, backend)) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        return JSONResponse(description(records), 200 if _is_ended(records) else 202)

    async def events(request: Request) -> Response:
        records = await _records(request, backend)
        return event_stream(events_of(backend, records[0].id, records[0].image_format or accepted_types(request).image_format or "jpeg"))

    async def picture(request: Request) -> Response:
        records = await _records(request, backend)
        image_format = records[0].image_format or accepted_types(request).image_format
        if image_format is None:
            raise NotAcceptable(f"Accept allows none of {', '.join(MEDIA_TYPES.values())}", field="Accept")
        if not _is_ended(records):
            return accepted_answer(records)
        answer = await run_in_threadpool(_picture_answer, backend, records[0], image_format)
        if request.method != "HEAD":
            await _note_fetched(backend, records[0])
        return answer

    follow_events = Route("/jobs/{job_id}/events", answering_errors(events), methods=["GET"])
    follow_events.methods = {"GET"}  # not HEAD, which would wait for the job's end without a word
    return [
        Route("/jobs/{job_id}", answering_errors(job), methods=["GET"]),
        Route("/jobs/{job_id}", answering_errors(cancel), methods=["DELETE"]),
        follow_events,
        Route("/jobs/{job_id}/picture", answering_errors(picture), methods=["GET"]),
    ]


async def _records(request: Request, backend: Backend) -> list[JobRecord]:
    """With API keys a job is its key's alone; without them whoever knows its id may ask."""
    owner = owner_of(request) if key_name_of(request) is not None else None
    return await run_in_threadpool(backend.jobs.get, request.scope["path_values"]["job_id"], owner)


def accepted_answer(records: Sequence[JobRecord]) -> Response:
    """202: the job is being drawn, and where to ask."""
    headers = {"Location": f"/jobs/{records[0].id}", "Retry-After": str(_ASK_AGAIN_S)}
    return JSONResponse(description(records), 202, headers | followed_headers())


async def awaited_picture(backend: Backend, job_id: str, image_format: ImageFormat) -> Response:
    """The picture of an unattended job, as soon as it is there."""
    last: list[JobRecord] = []
    async with aclosing(follow(backend, job_id)) as standings:
        async for records in standings:
            last = records
    answer = await run_in_threadpool(_picture_answer, backend, last[0], image_format)
    await _note_fetched(backend, last[0])
    answer.headers.update(followed_headers())
    return answer


def _picture_answer(backend: Backend, record: JobRecord, image_format: ImageFormat) -> Response:
    return picture_answer(record.task, record.finished(), backend.model(), image_format)


async def _note_fetched(backend: Backend, record: JobRecord) -> None:
    """A picture that is here is sent, whether that can be noted or not."""
    with suppress(JobsUnavailable):
        await run_in_threadpool(backend.jobs.note_fetched, record.id)


async def events_of(backend: Backend, job_id: str, image_format: ImageFormat) -> AsyncGenerator[bytes, None]:
    """What happens to a job from now on; a picture that is not kept is not in `completed`."""
    told: tuple[object, ...] = ()
    preview = None
    try:
        async with aclosing(follow(backend, job_id)) as standings:
            async for records in standings:
                if not _is_ended(records):
                    progress = _progress(records)
                    if not _is_estimated(records):
                        continue
                    if (now := (progress.position, progress.step)) != told:
                        yield progress_event(progress)
                        told = now
                    if records[0].preview_png is not None and records[0].preview_png != preview:
                        preview = records[0].preview_png
                        yield await run_in_threadpool(_preview_event, records[0])
                elif (error := next((record.error for record in records if record.error is not None), None)) is not None:
                    raise error
                elif records[0].picture is None:
                    yield server_sent.event("completed", {"job": description(records)})
                else:
                    yield await run_in_threadpool(_completed_event, backend, records[0], image_format)
                    await _note_fetched(backend, records[0])
    except Exception as error:
        yield error_event(error, "The stream of events of a job")


def _completed_event(backend: Backend, record: JobRecord, image_format: ImageFormat) -> bytes:
    return completed_event(record.task, record.finished(), backend.model(), image_format)


def _preview_event(record: JobRecord) -> bytes:
    assert record.preview is not None
    return preview_event(record.progress.step, record.preview, record.task)


def description(records: Sequence[JobRecord]) -> dict[str, Any]:
    """A job as JSON; one of several pictures is as far as all of them are together."""
    progress, first = _progress(records), records[0]
    error = next((record.error for record in records if record.error is not None), None)
    ended = [record.ended_at for record in records if record.ended_at is not None]
    return {
        "id": first.id,
        "state": _state(records),
        "kind": first.task.kind,
        "images": len(records),
        "position": progress.position if _is_estimated(records) else None,
        "step": progress.step,
        "steps": progress.steps,
        "seconds_left": round(progress.seconds_left, 1) if _is_estimated(records) else None,
        "created_at": _iso(first.created_at),
        "ended_at": _iso(max(ended)) if _is_ended(records) else None,
        "picture": f"/jobs/{first.id}/picture" if first.picture is not None else None,
        "picture_kept_until": None if first.kept_until is None else _iso(first.kept_until),
        **({} if error is None else error_body(error.type, error.message, error.problems)),
    }


def _is_ended(records: Sequence[JobRecord]) -> bool:
    return all(record.is_ended for record in records)


def _is_estimated(records: Sequence[JobRecord]) -> bool:
    return all(record.is_estimated for record in records)


def _state(records: Sequence[JobRecord]) -> State:
    states = {record.state for record in records}
    if not _is_ended(records):
        return "queued" if states == {"queued"} else "running"
    return next(state for state in ("failed", "cancelled", "completed") if state in states)


def _progress(records: Sequence[JobRecord]) -> Progress:
    """Of all pictures together."""
    standings = [record.progress for record in records]
    waiting = [standing.position for standing in standings]
    return Progress(
        position=min(waiting) if _state(records) == "queued" else 0,
        step=sum(standing.step for standing in standings),
        steps=sum(standing.steps for standing in standings),
        seconds_left=max(standing.seconds_left for standing in standings),
    )


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")
