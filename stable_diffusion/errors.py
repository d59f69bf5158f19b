"""What can go wrong, as a tree. Each error carries its HTTP status; only `answers.py` turns it into an answer.

ServiceError
├── InvalidRequest            400  a field or a part is missing, malformed or out of range
├── TooLarge                  413  a body or an image has too many bytes or pixels
├── UnsupportedMediaType      415  the body is not of the type that the endpoint takes
├── NotAcceptable             406  the Accept header allows no image type that we can send
├── ClientGone                499  the client closed the connection; nobody reads the answer
├── GenerationFailed          500  this job could not be finished; its neighbours were not harmed
├── InternalError             500  a defect of ours
└── ModelUnavailable          503  the model process cannot be reached
ModelFolderError                   at start only: the weights are missing, broken or of another kind
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FieldError:
    """One thing that is wrong: the field (or part, or header) and what is allowed."""

    field: str | None
    message: str


class ServiceError(Exception):
    """The root of everything that is answered over HTTP. `type` is a stable name for programs, `problems` are for people."""

    status = 500
    type = "internal_error"

    def __init__(self, message: str, *, field: str | None = None, problems: list[FieldError] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.problems = problems if problems is not None else [FieldError(field, message)]


class InvalidRequest(ServiceError):
    status = 400
    type = "invalid_request"


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


class GenerationFailed(ServiceError):
    status = 500
    type = "generation_failed"


class InternalError(ServiceError):
    status = 500
    type = "internal_error"


class ModelUnavailable(ServiceError):
    status = 503
    type = "model_unavailable"


class ModelFolderError(Exception):
    """The weights cannot be served. The message names the file that is wrong and what to do."""
