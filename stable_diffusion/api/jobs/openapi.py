"""/jobs in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from stable_diffusion.api.job import CompletedJobEvent, Job
from stable_diffusion.api.openapi import EVENTS, errors, event_content, json_response, operation
from stable_diffusion.api.responses import CompletedEvent
from stable_diffusion.images.encode import MEDIA_TYPES

TAG = {"name": "jobs", "description": "Follow, fetch, cancel"}

_UNKNOWN = {
    "404": "No such job, or its picture was sent in the answer and is not kept.",
    "503": "Where jobs stand cannot be read, or the model process could not be reached.",
}
_JOB_ID = {
    "name": "job_id",
    "in": "path",
    "required": True,
    "description": "From the header Job-Id of an answer.",
    "schema": {"type": "string", "minLength": 1},
}


_NO_PICTURE = {
    **_UNKNOWN,
    "400": "A prompt was too long, or a LoRA could not be used.",
    "406": "The Accept header allows none of the image types.",
    "410": "It was kept and is gone.",
    "429": "It was not taken on.",
    "499": "The job was cancelled.",
    "500": "It could not be drawn.",
    "504": "It was not finished in the time that was allowed.",
}


def paths() -> dict[str, Any]:
    job = {"200": json_response("The job.", Job)}
    cancelled = {
        "200": json_response("It has ended, if it had not before.", Job),
        "202": json_response("It ends after the step that is being taken.", Job),
    }
    told = "The events queued, progress, preview, completed and error, each with JSON. `completed` has the picture if it is kept."
    events = {"200": {"description": told, "content": event_content({**EVENTS, "completed": CompletedEvent | CompletedJobEvent})}}
    picture = {
        "200": {"description": "The picture.", "content": {media_type: {} for media_type in MEDIA_TYPES.values()}},
        "202": json_response("It is not finished.", Job),
    }
    return {
        "/jobs/{job_id}": {
            "parameters": [_JOB_ID],
            "get": operation(TAG, "job", "Where does a job stand?", job | errors(_UNKNOWN)),
            "delete": operation(TAG, "cancel", "Cancel a job within one step", cancelled | errors(_UNKNOWN)),
        },
        "/jobs/{job_id}/events": {
            "parameters": [_JOB_ID],
            "get": operation(TAG, "job_events", "What happens to a job from now on", events | errors(_UNKNOWN)),
        },
        "/jobs/{job_id}/picture": {
            "parameters": [_JOB_ID],
            "get": operation(TAG, "job_picture", "The picture of a job that nobody waited for", picture | errors(_NO_PICTURE)),
        },
    }
