"""A job's records in the job store, one per image, and the fingerprint that tells whether two requests are the same.

Does not know how records are stored.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from PIL import Image

from stable_diffusion.core.errors import Cancelled, PictureExpired, PictureNotKept, ServiceError, error_of_type
from stable_diffusion.core.types import GeneratedImage, ImageFormat, LoraChoice, Progress, Task

IMAGES_KEPT_S = 3600
IMAGES_KEPT = 100  # on one machine

State = Literal["queued", "running", "completed", "failed", "cancelled"]


@dataclass(frozen=True)
class JobRecord:
    """The stored state of one image of a job. Times in seconds since 1970. `progress` does not contain the preview."""

    id: str
    index: int
    task: Task  # without its images
    asynchronous: bool
    state: State
    progress: Progress
    is_estimated: bool  # False: its position and remaining seconds are not known yet
    preview_png: bytes | None
    image_format: ImageFormat | None  # as requested
    created_at: float
    ended_at: float | None
    outcome: dict[str, Any]
    image: bytes | None  # PNG
    attempt: int = 0  # how often the image was taken away from a machine

    @property
    def is_ended(self) -> bool:
        return self.ended_at is not None

    @property
    def preview(self) -> Image.Image | None:
        return None if self.preview_png is None else from_png(self.preview_png)

    @property
    def kept_until(self) -> float | None:
        return None if self.image is None or self.ended_at is None else self.ended_at + IMAGES_KEPT_S

    @property
    def error(self) -> ServiceError | None:
        return error_of_type(**self.outcome) if self.state in ("failed", "cancelled") else None

    def finished(self) -> GeneratedImage:
        """The image of a completed job. Raises the job's error, PictureNotKept or PictureExpired."""
        if self.error is not None:
            raise self.error
        if not self.asynchronous:
            raise PictureNotKept("this job's image was sent in the response and is not kept")
        if self.image is None:
            minutes = IMAGES_KEPT_S // 60
            raise PictureExpired(f"the image has been deleted: images are kept for {minutes} minutes, the oldest only while there is room")
        return GeneratedImage(from_png(self.image), **self.outcome)


def fingerprint(path: str, tasks: Sequence[Task], seed: int | None) -> str:
    """A digest that distinguishes requests. `seed`: of the first image as requested, since a random one differs each time."""
    digest = hashlib.sha256(repr((path, len(tasks))).encode())
    for field in fields(Task):
        value = seed if field.name == "seed" else getattr(tasks[0], field.name)
        digest.update(repr((field.name, None if isinstance(value, Image.Image) else value)).encode("utf-8", "replace"))
        if isinstance(value, Image.Image):
            digest.update(repr((value.mode, value.size)).encode())
            digest.update(value.tobytes())
    return digest.hexdigest()


def described(task: Task) -> str:
    """A task as JSON, without its images."""
    return json.dumps({field.name: getattr(task, field.name) for field in fields(Task) if field.name not in ("image", "mask")})


def task_of(description: str | bytes) -> Task:
    """The task that `described` has described."""
    values = json.loads(description)
    return Task(**values | {"loras": tuple(LoraChoice(*choice) for choice in values["loras"])})


def state_of_error(error: ServiceError) -> State:
    return "cancelled" if isinstance(error, Cancelled) else "failed"


def key_digest(owner: str, idempotency_key: str) -> str:
    """Under what an idempotency key is stored: each owner has keys of its own."""
    return hashlib.sha256(f"{owner}\n{idempotency_key}".encode()).hexdigest()


def as_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def from_png(png: bytes) -> Image.Image:
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        return image.copy()
