"""The shared parts of the OpenAPI document: operations, responses, events, and what operations that generate have in common.

The `openapi` modules of the API packages use them. Where a schema belongs, they put the type that the code reads or sends;
`server/openapi.py` replaces it by its JSON Schema.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from stable_diffusion.api.job import Job
from stable_diffusion.api.responses import CompletedEvent, Error, PreviewEvent, ProgressEvent, QueuedEvent
from stable_diffusion.core.settings import MAX_TIMEOUT_S
from stable_diffusion.images.encode import MEDIA_TYPES
from stable_diffusion.state.job_record import IMAGES_KEPT, IMAGES_KEPT_S
from stable_diffusion.state.jobs import MAX_ASYNCHRONOUS_JOBS
from stable_diffusion.web import sse
from stable_diffusion.web.headers import TIMEOUT_HEADER


def operation(tag: dict[str, str], name: str, summary: str, responses: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"operationId": name, "summary": summary, "tags": [tag["name"]], **more, "responses": responses}


def json_content(model: Any, **more: Any) -> dict[str, Any]:
    return {"application/json": {"schema": model, **more}}


def json_response(description: str, model: Any, **more: Any) -> dict[str, Any]:
    return {"description": description, "content": json_content(model, **more)}


def errors(descriptions: dict[str, str], model: Any = Error) -> dict[str, Any]:
    """The responses of these statuses, with errors of type `model`."""
    return {status: json_response(description, model) for status, description in descriptions.items()}


def event_content(events: dict[str, Any], event_id: str | None = None) -> dict[str, Any]:
    """The content of a stream: one event's schema. `events` has the type of each event's data, which is JSON.

    `event_id` describes the events' ids, if they have any.
    """
    kinds = []
    for name, data in events.items():
        properties = {"event": {"const": name}, "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": data}}
        if event_id is not None:
            properties["id"] = {"type": "string", "description": event_id}
        kinds.append({"type": "object", "required": ["event", "data"], "properties": properties})
    return {sse.MEDIA_TYPE: {"schema": {"oneOf": kinds}}}


TIMEOUT_PARAMETER: dict[str, Any] = {
    "name": TIMEOUT_HEADER,
    "in": "header",
    "description": f"Time limit for the response in seconds: above 0, at most {MAX_TIMEOUT_S:.0f}, which is the default. A request that "
    "cannot meet it is refused at once, and one that exceeds it is dropped, both with 504.",
    "schema": {"type": "string", "pattern": r"^[0-9]{1,4}(\.[0-9]{1,3})?$"},
}
LOAD_ERRORS = {
    "429": "The queue is full (`queue_full`). The header Retry-After estimates when there is room.",
    "503": "The model process is starting (`model_loading`; the message says how far it is), has ended or cannot be reached "
    "(`model_unavailable`), or the server is stopping (`shutting_down`). The header Retry-After says when to try again.",
    "504": f"The time limit in {TIMEOUT_HEADER} cannot be met or was exceeded (`deadline_exceeded`).",
}

# Of the native API and /reproduce.
IDEMPOTENCY_KEY: dict[str, Any] = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "A second request with the same key gets the job of the first, running or finished, instead of a new one. Such a job "
    "runs to its end even if the client disconnects.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"},
}
REQUEST_HEADERS: list[dict[str, Any]] = [
    {
        "name": "Prefer",
        "in": "header",
        "description": "`respond-async`: respond at once with 202 and the job's address; the image is fetched later.",
        "schema": {"type": "string"},
    },
    IDEMPOTENCY_KEY,
]
EVENTS = {"queued": QueuedEvent, "progress": ProgressEvent, "preview": PreviewEvent, "completed": CompletedEvent, "error": Error}
_EVENT_ID = "Only with Idempotency-Key: where `GET /jobs/{job_id}/events` goes on, with the header Last-Event-ID."
_ACCEPTED = {
    **json_response(f"The job was accepted. The server keeps the last {IMAGES_KEPT} images, for {IMAGES_KEPT_S // 60} minutes.", Job),
    "headers": {"Location": {"description": "The job's address.", "schema": {"type": "string"}}},
}
_RESPONSE_HEADERS = {
    "prompt": "The prompt as used. Text in headers is percent-encoded UTF-8, cut after 1024 characters.",
    "negative_prompt": "The negative prompt as used.",
    "prompt_dropped": "Present only if the prompt was too long: the end that was not used.",
    "negative_prompt_dropped": "Present only if the negative prompt was too long: the end that was not used.",
    "height": "Height in pixels.",
    "width": "Width in pixels.",
    "num_inference_steps": "Denoising steps.",
    "guidance_scale": "Guidance scale.",
    "guidance_end": "The share of the steps that used guidance.",
    "eta": "Present only if above 0: how much noise each step added.",
    "seed": "The seed: send it again to get the same image.",
    "scheduler": "Noise scheduler.",
    "strength": "Strength (img2img and inpaint only).",
    "prompt_syntax": "The syntax in which the prompts were read.",
    "clip_skip": "Which layer of the text encoder was used. 1: the one that the model is made for.",
    "loras": "Present only if LoRAs were used: a JSON list of their names and weights.",
    "safety_check": "Whether a safety check was requested. It runs only if the model has a safety checker.",
    "safety_flagged": "true: the image was flagged and is blank. false: it was not. unchecked: no safety check ran.",
    "decoded_again": "Present only if decoding failed at first. float32: the image was black or broken; tiles: it did not fit into memory.",
    "model": "The model; `demo` is the embedded demo model.",
    "Job-Id": "The id of this request's job.",
}
_ERRORS = {
    "400": "A field or a part is missing, malformed or out of range.",
    "403": "A browser sent the request from a page of another site.",
    "406": "The Accept header allows none of the image types.",
    "408": "The body stalled or arrived too slowly; the connection is closed.",
    "413": "The body or an image is too large.",
    "415": "The body is not of the type that the endpoint takes.",
    "422": "The Idempotency-Key was used for another request, or a requested LoRA does not exist (`lora_not_found`).",
    "499": "The job was cancelled.",
    "500": "Generation failed.",
    **LOAD_ERRORS,
    "429": f"{LOAD_ERRORS['429']} Or {MAX_ASYNCHRONOUS_JOBS} asynchronous jobs are unfinished (`too_many_jobs`).",
}
IMAGES_TAG = {"name": "images", "description": "Generate images"}
EXAMPLE = {"prompt": "a small red circle on a blue background", "num_inference_steps": 50, "guidance_scale": 7.5, "seed": 1}


def multipart(files: dict[str, str], required: tuple[str, ...], data: Any, example: dict[str, Any]) -> dict[str, Any]:
    """The request body of a form: `files` describes each uploaded image, `data` is the model of the part that holds JSON."""
    parts: dict[str, Any] = {name: {"type": "string", "format": "binary", "description": text} for name, text in files.items()}
    return {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": list(required),
                "properties": parts | {"data": Annotated[data, Field(json_schema_extra={"example": example})]},
                "additionalProperties": False,
            },
            "encoding": {"data": {"contentType": "application/json"}},
        }
    }


def generates(
    name: str,
    summary: str,
    content: dict[str, Any],
    tag: dict[str, str] = IMAGES_TAG,
    more_headers: dict[str, str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The path item of an operation that responds with an image; `more` and `more_headers` are further content and headers of it."""
    headers = _RESPONSE_HEADERS | (more_headers or {})
    if name == "txt2img":
        headers.pop("strength")
    responses: dict[str, Any] = {
        "200": {
            "description": "The image. Or, if Accept asks for text/event-stream, events until the image is ready: queued, progress, "
            "preview, completed and error, each with JSON.",
            "headers": {header: {"description": text, "schema": {"type": "string"}} for header, text in headers.items()},
            "content": {**{media_type: {} for media_type in MEDIA_TYPES.values()}, **event_content(EVENTS, _EVENT_ID), **more},
        },
        "202": _ACCEPTED,
        **errors(_ERRORS),
    }
    responses["429"]["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    parameters, body = [*REQUEST_HEADERS, TIMEOUT_PARAMETER], {"required": True, "content": content}
    return {"post": operation(tag, name, summary, responses, parameters=parameters, requestBody=body)}
