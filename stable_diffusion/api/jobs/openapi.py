"""/jobs in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from stable_diffusion.api.job import CompletedJobEvent, Job
from stable_diffusion.api.openapi import EVENTS, errors, event_content, json_response, operation
from stable_diffusion.api.responses import CompletedEvent
from stable_diffusion.images.encode import MEDIA_TYPES
from stable_diffusion.web.sse import LAST_ID_HEADER

TAG = {"name": "jobs", "description": "Follow, fetch, cancel"}

_UNKNOWN = {
    "404": "The job does not exist, or its image was sent in the response and is not kept.",
    "503": "The state of the jobs cannot be read, or the model process could not be reached.",
}
_JOB_ID = {
    "name": "job_id",
    "in": "path",
    "required": True,
    "description": "From the header Job-Id of a response.",
    "schema": {"type": "string", "minLength": 1},
}
_EVENT_ID = "For the header Last-Event-ID. An error without an id is not the job's end: its state could not be read."
_LAST_EVENT_ID = {
    "name": LAST_ID_HEADER,
    "in": "header",
    "description": "The id of the last event that the client has read, as browsers send it when they connect again: the events go on "
    "after it. Any other text counts as absent: the events begin with where the job stands.",
    "schema": {"type": "string"},
}
_NO_IMAGE = {
    **_UNKNOWN,
    "400": "A prompt was too long, or a LoRA could not be used.",
    "406": "The Accept header allows none of the image types.",
    "410": "The image is no longer kept.",
    "429": "The job was not accepted.",
    "499": "The job was cancelled.",
    "500": "Generation failed.",
    "504": "The job did not finish within its time limit.",
}


def paths() -> dict[str, Any]:
    job = {"200": json_response("The job.", Job)}
    cancelled = {
        "200": json_response("The job has ended, now or before.", Job),
        "202": json_response("The job ends after its current step.", Job),
    }
    described = "The events queued, progress, preview, completed and error, each with JSON. `completed` has the image if it is kept."
    content = event_content({**EVENTS, "completed": CompletedEvent | CompletedJobEvent}, _EVENT_ID)
    events = {
        "200": {"description": described, "content": content},
        "204": {"description": "The job has ended, and Last-Event-ID is the id of its last event."},
    }
    image = {
        "200": {"description": "The image.", "content": {media_type: {} for media_type in MEDIA_TYPES.values()}},
        "202": json_response("The job is not finished.", Job),
    }
    return {
        "/jobs/{job_id}": {
            "parameters": [_JOB_ID],
            "get": operation(TAG, "job", "State and progress of a job", job | errors(_UNKNOWN)),
            "delete": operation(TAG, "cancel", "Cancel a job within one step", cancelled | errors(_UNKNOWN)),
        },
        "/jobs/{job_id}/events": {
            "parameters": [_JOB_ID],
            "get": operation(TAG, "job_events", "Events of a job from now on", events | errors(_UNKNOWN), parameters=[_LAST_EVENT_ID]),
        },
        "/jobs/{job_id}/picture": {
            "parameters": [_JOB_ID],
            "get": operation(TAG, "job_picture", "The image of an asynchronous job", image | errors(_NO_IMAGE)),
        },
    }
