"""The tree of errors. Each error carries its HTTP status; the API packages turn errors into responses.

ServiceError
├── InvalidRequest            400  a field or a part is missing, malformed or out of range
│   └── UnknownParameter      400  a field that does not exist, in APIs that distinguish this case
├── NotFound                  404  the request names a sampler, a model or an image that does not exist
│   └── ModelNotFound         404  the request asks for a model that is not served, in APIs that distinguish this case
├── LoraNotFound              422  the server has no LoRA of this name, or its file cannot be used; the message lists the names
├── Unauthorized              401  the server requires an API key, and the request carries no valid one
├── RateLimited               429  the caller has exceeded the limit of generation requests per minute
├── UnknownJob                404  there is no job with this id
├── PictureNotKept            404  the job's image was sent in the response and is not kept
├── PictureExpired            410  the job's image was kept and has been deleted
├── IdempotencyMismatch       422  the idempotency key was used for another request
├── TooManyJobs               429  too many asynchronous jobs are unfinished
├── QueueFull                 429  the queue is full
├── RequestTimeout            408  the body stalled or came too slowly; the connection is closed
├── TooLarge                  413  a body or an image has too many bytes or pixels
├── UnsupportedMediaType      415  the endpoint does not accept the body's content type
├── NotAcceptable             406  the Accept header allows no image type that the server can send
├── ClientGone                499  the client closed the connection and does not read the response
├── Cancelled                 499  the job was cancelled on request
├── GenerationFailed          500  this job could not be finished; other jobs in its batch are not affected
├── InternalError             500  a defect in the server
├── JobsUnavailable           503  the job store cannot be read or written
│   └── SharedStateUnavailable 503  what the machines share (SD_SHARED_STATE) cannot be reached, or has no room
├── ModelLoading              503  the model process is starting; the message names the stage
├── ModelUnavailable          503  the model process cannot be reached
├── ShuttingDown              503  the server stops, and the image was not finished within the grace period
└── DeadlineExceeded          504  the time that the request allows is too short, or has passed
ModelFolderError                   at start only: the weights are missing, broken or of an unsupported kind
SettingError                       at start only: an environment variable, or the file that it names, is invalid
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("stable_diffusion")


@dataclass(frozen=True)
class FieldError:
    """One problem: the field (or part, or header) that is wrong, and what is allowed."""

    field: str | None
    message: str


class ServiceError(Exception):
    """The base of all errors that clients see over HTTP. `type` is a stable name for programs, `problems` are for people."""

    status = 500
    type = "internal_error"
    retry_after_s: int | None = None
    closes_connection = False  # True: the unread rest of the body would be taken for the next request, or never ends

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        problems: list[FieldError] | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s
        self.problems = problems if problems is not None else [FieldError(field, message)]

    def facts(self) -> dict[str, Any]:
        """What another process needs for `error_of_type`, as plain values."""
        field = self.problems[0].field if self.problems else None
        return {"type": self.type, "message": self.message, "retry_after_s": self.retry_after_s, "field": field}


class InvalidRequest(ServiceError):
    status = 400
    type = "invalid_request"


class UnknownParameter(InvalidRequest):
    type = "unknown_parameter"


class NotFound(ServiceError):
    status = 404
    type = "not_found"


class ModelNotFound(NotFound):
    type = "model_not_found"


class LoraNotFound(ServiceError):
    status = 422
    type = "lora_not_found"


class Unauthorized(ServiceError):
    status = 401
    type = "unauthorized"


class RateLimited(ServiceError):
    status = 429
    type = "rate_limited"


class UnknownJob(ServiceError):
    status = 404
    type = "unknown_job"


class PictureNotKept(ServiceError):
    status = 404
    type = "picture_not_kept"


class PictureExpired(ServiceError):
    status = 410
    type = "picture_expired"


class IdempotencyMismatch(ServiceError):
    status = 422
    type = "idempotency_mismatch"


class TooManyJobs(ServiceError):
    status = 429
    type = "too_many_jobs"


class QueueFull(ServiceError):
    status = 429
    type = "queue_full"


class RequestTimeout(ServiceError):
    status = 408
    type = "request_timeout"
    closes_connection = True


class TooLarge(ServiceError):
    status = 413
    type = "too_large"


class UnsupportedMediaType(ServiceError):
    status = 415
    type = "unsupported_media_type"


class NotAcceptable(ServiceError):
    status = 406
    type = "not_acceptable"


class ClientGone(ServiceError):
    status = 499
    type = "client_gone"


class Cancelled(ServiceError):
    status = 499
    type = "cancelled"


class GenerationFailed(ServiceError):
    status = 500
    type = "generation_failed"


class InternalError(ServiceError):
    status = 500
    type = "internal_error"


class JobsUnavailable(ServiceError):
    status = 503
    type = "jobs_unavailable"
    retry_after_s = 10


class SharedStateUnavailable(JobsUnavailable):
    type = "shared_state_unavailable"
    retry_after_s = 5


class ModelLoading(ServiceError):
    status = 503
    type = "model_loading"
    retry_after_s = 10


class ModelUnavailable(ServiceError):
    status = 503
    type = "model_unavailable"
    retry_after_s = 60


class ShuttingDown(ServiceError):
    status = 503
    type = "shutting_down"
    retry_after_s = 60


class DeadlineExceeded(ServiceError):
    status = 504
    type = "deadline_exceeded"


# The errors with which a job in a model process may end.
_OF_JOBS = (InvalidRequest, GenerationFailed, Cancelled, QueueFull, DeadlineExceeded, ModelLoading, ModelUnavailable, ShuttingDown)


def error_of_type(type: str, message: str, retry_after_s: int | None = None, field: str | None = None) -> ServiceError:
    """Rebuild an error that another process has sent. An unknown type becomes GenerationFailed."""
    kind = next((kind for kind in _OF_JOBS if kind.type == type), GenerationFailed)
    return kind(message, retry_after_s=retry_after_s, field=field)


def as_service_error(error: BaseException, where: str) -> ServiceError:
    """The error that the client sees. An unexpected error is logged with `where` and becomes an InternalError."""
    if isinstance(error, ServiceError):
        return error
    logger.error("%s failed.", where, exc_info=error)
    return InternalError("internal error; the server's log has the details")


class ModelFolderError(Exception):
    """The weights cannot be served. The message names the wrong file and says what to do."""


class SettingError(Exception):
    """The environment does not allow the server to start. The message names the variable and what is allowed, never a secret."""
