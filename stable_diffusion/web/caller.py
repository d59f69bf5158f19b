"""The sender of a request, the job that the request is for, and its time limit."""

from __future__ import annotations

import hashlib
import re
import time

from starlette.requests import Request

from stable_diffusion.core.errors import DeadlineExceeded, InvalidRequest
from stable_diffusion.core.settings import MAX_TIMEOUT_S
from stable_diffusion.core.types import RequestContext, Ticket

TIMEOUT_HEADER = "Request-Timeout"  # seconds


def context_of(request: Request) -> RequestContext:
    """What the front door has stored about the request."""
    found: RequestContext = request.scope[RequestContext.KEY]
    return found


def ticket_of(request: Request) -> Ticket:
    """A ticket for the request: the job id from the front door, the owner, and the remaining time.

    Raises InvalidRequest, or DeadlineExceeded if reading the request has used up the time.
    """
    found = context_of(request)
    left_s = _timeout_s(request) - (time.monotonic() - found.received_s)
    if left_s <= 0:
        raise DeadlineExceeded("the time that the request allows was over before it was read")
    return Ticket(job_id=found.job_id, owner=owner_of(request), timeout_s=left_s)


def _timeout_s(request: Request) -> float:
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return MAX_TIMEOUT_S
    # No exponents, no signs, no inf or nan.
    timeout_s = float(text) if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text, re.ASCII) else 0.0
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        message = f"{TIMEOUT_HEADER}: must be a number of seconds above 0, at most {MAX_TIMEOUT_S:.0f}"
        raise InvalidRequest(message, field=TIMEOUT_HEADER)
    return timeout_s


def rename_job(request: Request, job_id: str) -> None:
    """Assign the request to an existing job, whose id the response then carries, even if it is an error."""
    context_of(request).job_id = job_id


def key_name_of(request: Request) -> str | None:
    """The name of the request's API key; None if the server has no keys."""
    return context_of(request).key_name


def owner_of(request: Request) -> str:
    """An opaque identifier of the caller.

    It derives from the API key if the server has keys, else from the Authorization header, or without one from the address.
    """
    name = key_name_of(request)
    if name is not None:
        return hashlib.sha256(f"key {name}".encode()).hexdigest()[:32]
    authorization = request.headers.get("authorization", "")
    if not authorization.partition(" ")[2]:  # clients without a password send an empty header, or only a scheme
        authorization = ""
    address = request.client.host if request.client else ""
    return hashlib.sha256(f"{authorization}\n{'' if authorization else address}".encode()).hexdigest()[:32]
