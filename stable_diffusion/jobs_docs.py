"""Jobs in the OpenAPI document. Knows nothing of how requests are answered."""

from __future__ import annotations

from typing import Any

from stable_diffusion.events import MEDIA_TYPE
from stable_diffusion.images import MEDIA_TYPES
from stable_diffusion.jobs import MAX_UNATTENDED, PICTURES_KEPT, PICTURES_KEPT_S
from stable_diffusion.load_docs import LOAD_ERRORS

TAG = {"name": "jobs", "description": "Follow, fetch, cancel"}

# Of the plain endpoints.
REQUEST_HEADERS: list[dict[str, Any]] = [
    {
        "name": "Prefer",
        "in": "header",
        "description": "`respond-async`: answer at once with 202 and the job's address; the picture is fetched later.",
        "schema": {"type": "string"},
    },
    {
        "name": "Idempotency-Key",
        "in": "header",
        "description": "A second request with the same key gets the first one's job, running or done, instead of another. Such a job is "
        "drawn to its end even if the client leaves.",
        "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"},
    },
]
_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
_JOB = {"application/json": {"schema": {"$ref": "#/components/schemas/Job"}}}
ACCEPTED = {
    "description": f"The job is being drawn. Its picture is kept for {PICTURES_KEPT_S // 60} minutes, the last {PICTURES_KEPT} are.",
    "headers": {"Location": {"description": "The job's address.", "schema": {"type": "string"}}},
    "content": _JOB,
}
ERRORS: dict[str, dict[str, Any]] = {
    "422": {"description": "The Idempotency-Key was used for another request.", "content": _ERROR},
    "429": {
        "description": f"{LOAD_ERRORS['429']} Or {MAX_UNATTENDED} jobs that nobody waits for are not finished (`too_many_jobs`).",
        "headers": {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}},
        "content": _ERROR,
    },
    "499": {"description": "The job was cancelled.", "content": _ERROR},
}
_UNKNOWN = {
    "404": {"description": "No such job, or its picture was sent in the answer and is not kept.", "content": _ERROR},
    "503": {"description": "Where jobs stand cannot be read, or the model process could not be reached.", "content": _ERROR},
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
            "get": _operation("job", "Where does a job stand?", {"200": {"description": "The job.", "content": _JOB}}),
            "delete": _operation(
                "cancel",
                "Cancel a job within one step",
                {
                    "200": {"description": "It has ended, if it had not before.", "content": _JOB},
                    "202": {"description": "It ends after the step that is being taken.", "content": _JOB},
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
                        "content": {MEDIA_TYPE: {}},
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
                    "202": {"description": "It is not finished.", "content": _JOB},
                    "406": {"description": "The Accept header allows none of the image types.", "content": _ERROR},
                    "429": {"description": "It was not taken on.", "content": _ERROR},
                    "504": {"description": "It was not finished in the time that was allowed.", "content": _ERROR},
                    "410": {"description": "It was kept and is gone.", "content": _ERROR},
                    "499": ERRORS["499"],
                    "500": {"description": "It could not be drawn.", "content": _ERROR},
                },
            ),
        },
    }


def _operation(name: str, summary: str, answers: dict[str, Any]) -> dict[str, Any]:
    return {"operationId": name, "summary": summary, "tags": [TAG["name"]], "responses": _UNKNOWN | answers}


def schemas() -> dict[str, Any]:
    count, time = {"type": "integer", "minimum": 0}, {"type": "string", "format": "date-time"}
    properties: dict[str, Any] = {
        "id": {"type": "string"},
        "state": {"enum": ["queued", "running", "completed", "failed", "cancelled"]},
        "kind": {"enum": ["txt2img", "img2img", "inpaint"]},
        "images": {"type": "integer", "minimum": 1, "description": "Pictures of the job; steps are those of all of them."},
        "position": {
            "type": ["integer", "null"],
            "minimum": 0,
            "description": "Its place among those that wait for their first step, 0 for all others; null before it is known.",
        },
        "step": count,
        "steps": count,
        "seconds_left": {
            "type": ["number", "null"],
            "minimum": 0,
            "description": "Estimated from measured steps, if nobody else comes; null before it is known.",
        },
        "created_at": time,
        "ended_at": {"anyOf": [time, {"type": "null"}]},
        "picture": {"type": ["string", "null"], "description": "Where it can be fetched."},
        "picture_kept_until": {"anyOf": [time, {"type": "null"}]},
    }
    error = {"$ref": "#/components/schemas/Error/properties/error"}
    return {"Job": {"type": "object", "required": list(properties), "properties": {**properties, "error": error}}}
