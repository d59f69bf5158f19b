"""/jobs in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from stable_diffusion.api.job import CompletedJobEvent
from stable_diffusion.api.openapi import ERROR_CONTENT, ERRORS, EVENTS, JOB_CONTENT, event_content
from stable_diffusion.images.encode import MEDIA_TYPES
from stable_diffusion.web.responses import CompletedEvent

TAG = {"name": "jobs", "description": "Follow, fetch, cancel"}

_UNKNOWN = {
    "404": {"description": "No such job, or its picture was sent in the answer and is not kept.", "content": ERROR_CONTENT},
    "503": {"description": "Where jobs stand cannot be read, or the model process could not be reached.", "content": ERROR_CONTENT},
}
_JOB_ID = {
    "name": "job_id",
    "in": "path",
    "required": True,
    "description": "From the header Job-Id of an answer.",
    "schema": {"type": "string", "minLength": 1},
}


def paths() -> dict[str, Any]:
    return {
        "/jobs/{job_id}": {
            "parameters": [_JOB_ID],
            "get": _operation("job", "Where does a job stand?", {"200": {"description": "The job.", "content": JOB_CONTENT}}),
            "delete": _operation(
                "cancel",
                "Cancel a job within one step",
                {
                    "200": {"description": "It has ended, if it had not before.", "content": JOB_CONTENT},
                    "202": {"description": "It ends after the step that is being taken.", "content": JOB_CONTENT},
                },
            ),
        },
        "/jobs/{job_id}/events": {
            "parameters": [_JOB_ID],
            "get": _operation(
                "job_events",
                "What happens to a job from now on",
                {
                    "200": {
                        "description": "The events queued, progress, preview, completed and error, each with JSON. "
                        "`completed` has the picture if it is kept.",
                        "content": event_content({**EVENTS, "completed": CompletedEvent | CompletedJobEvent}),
                    }
                },
            ),
        },
        "/jobs/{job_id}/picture": {
            "parameters": [_JOB_ID],
            "get": _operation(
                "job_picture",
                "The picture of a job that nobody waited for",
                {
                    "200": {"description": "The picture.", "content": {media_type: {} for media_type in MEDIA_TYPES.values()}},
                    "202": {"description": "It is not finished.", "content": JOB_CONTENT},
                    "406": {"description": "The Accept header allows none of the image types.", "content": ERROR_CONTENT},
                    "429": {"description": "It was not taken on.", "content": ERROR_CONTENT},
                    "504": {"description": "It was not finished in the time that was allowed.", "content": ERROR_CONTENT},
                    "410": {"description": "It was kept and is gone.", "content": ERROR_CONTENT},
                    "499": ERRORS["499"],
                    "500": {"description": "It could not be drawn.", "content": ERROR_CONTENT},
                },
            ),
        },
    }


def _operation(name: str, summary: str, answers: dict[str, Any]) -> dict[str, Any]:
    return {"operationId": name, "summary": summary, "tags": [TAG["name"]], "responses": _UNKNOWN | answers}
