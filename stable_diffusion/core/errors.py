"""What can go wrong, as a tree. Each error carries its HTTP status; only doors turn it into an answer.

ServiceError
├── InvalidRequest            400  a field or a part is missing, malformed or out of range
│   └── UnknownParameter      400  a field that does not exist, where a door tells these apart
├── NotFound                  404  a sampler, a model or a picture that the request names is not there
│   └── ModelNotFound         404  another model was asked for than the one that is served, where a door tells these apart
├── Unauthorized              401  the server has API keys, and the request carries none of them
├── RateLimited               429  the caller has sent more drawing requests than are allowed in a minute
├── UnknownJob                404  no job of that id
├── PictureNotKept            404  the job's picture was sent in the answer and is not kept
├── PictureExpired            410  the job's picture was kept and is gone
├── IdempotencyMismatch       422  the key was used for another request
├── TooManyJobs               429  too many jobs that nobody waits for are not finished
├── QueueFull                 429  as much work as is allowed has been taken on
├── RequestTimeout            408  the body stalled or came too slowly; the connection is closed
├── TooLarge                  413  a body or an image has too many bytes or pixels
├── UnsupportedMediaType      415  the body is not of the type that the endpoint takes
├── NotAcceptable             406  the Accept header allows no image type that we can send
├── ClientGone                499  the client closed the connection; nobody reads the answer
├── Cancelled                 499  somebody asked for the job's cancellation
├── GenerationFailed          500  this job could not be finished; its neighbours were not harmed
├── InternalError             500  a defect of ours
├── JobsUnavailable           503  where jobs stand cannot be read or written
├── ModelLoading              503  the model process is starting: how far it is
├── ModelUnavailable          503  the model process cannot be reached
├── ShuttingDown              503  the server stops, and the picture was not finished within its grace period
└── DeadlineExceeded          504  the time that the request allows is not enough, or was not
ModelFolderError                   at start only: the weights are missing, broken or of another kind
SettingError                       at start only: an environment variable, or the file that it names, is wrong
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

logger = logging.getLogger("stable_diffusion")


@dataclass(frozen=True)
class FieldError:
    """One thing that is wrong: the field (or part, or header) and what is allowed."""

    field: str | None
    message: str


class ServiceError(Exception):
    """The root of everything that is answered over HTTP. `type` is a stable name for programs, `problems` are for people."""

    status = 500
    type = "internal_error"
    retry_after_s: int | None = None
    closes_connection = False  # where what the client is still sending would be taken for its next request, or never ends

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


# What may become of a job that a model process was asked to draw.
_OF_JOBS = (GenerationFailed, Cancelled, QueueFull, DeadlineExceeded, ModelLoading, ModelUnavailable, ShuttingDown)


def error_of_type(type: str, message: str, retry_after_s: int | None = None) -> ServiceError:
    """What another process has told of an error, as an error again; of a type that is not known here, GenerationFailed."""
    kind = next((kind for kind in _OF_JOBS if kind.type == type), GenerationFailed)
    return kind(message, retry_after_s=retry_after_s)


def as_service_error(error: BaseException, where: str) -> ServiceError:
    """What is told of an error. One that nobody foresaw goes to the log, with `where`."""
    if isinstance(error, ServiceError):
        return error
    logger.error("%s failed.", where, exc_info=error)
    return InternalError("an internal error, the server's log has the details")


class ModelFolderError(Exception):
    """The weights cannot be served. The message names the file that is wrong and what to do."""


class SettingError(Exception):
    """The server cannot be started as its environment says. The message names the variable and what is allowed, never a secret."""
