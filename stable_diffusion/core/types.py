"""What crosses package and process borders: what to generate, for whom, how far it is, and the finished image.

Plain data. Knows nothing of how an image is generated, sent or stored.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from stable_diffusion.core.settings import MAX_TIMEOUT_S

if TYPE_CHECKING:
    from PIL import Image


Precision = Literal["fp32", "fp16"]
ImageFormat = Literal["jpeg", "png", "webp"]
Kind = Literal["txt2img", "img2img", "inpaint"]


@dataclass(frozen=True)
class Task:
    """What to draw; every value is resolved and within its limits. Sizes in pixels, the image and mask already of that size."""

    kind: Kind
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    scheduler: str
    safety_check: bool
    guidance_end: float = 1.0  # the share of the steps that are guided
    preview_every_steps: int = 0  # 0: none
    metadata: bool = True  # whether the image file says how it was drawn
    strength: float = 1.0  # img2img and inpaint
    image: Image.Image | None = None  # RGB; img2img and inpaint
    mask: Image.Image | None = None  # L, white is repainted; inpaint
    image_hash: str | None = None  # what tells one input picture from another where the picture itself is not kept
    mask_hash: str | None = None


@dataclass(frozen=True)
class GeneratedImage:
    """A finished job. `flagged` is None where no safety checker looked at the picture."""

    image: Image.Image
    flagged: bool | None
    dropped_prompt: str  # what did not fit into the text encoder's tokens, "" if nothing
    dropped_negative_prompt: str
    device: str = ""  # "cpu", or the GPU's name; "" where it was not told
    dtype: str = ""  # what it was computed in, such as "float32"
    decoded_again: bool = False  # in float32, because what came out first was black or no numbers
    waited_s: float | None = None  # until its first step; None where it was not told


@dataclass(frozen=True)
class Progress:
    """Where a job stands. `position`: its place among those that wait for their first step, 0 for all others."""

    position: int
    step: int
    steps: int
    seconds_left: float
    preview: Image.Image | None = None  # an eighth of the picture's size


@dataclass(frozen=True)
class Ticket:
    """For whom a task is drawn. `index`: which picture of the job. An asynchronous one is drawn to its end and its picture is kept.

    `timeout_s`: how long it may take from now until the picture is there.
    """

    job_id: str
    owner: str
    index: int = 0
    asynchronous: bool = False
    timeout_s: float = MAX_TIMEOUT_S


@dataclass
class RequestContext:
    """What the front door has found out about a request before an endpoint sees it.

    `path` as it was sent: BentoML's metrics see the route's template in its place. `job_in_path` where the path names a job.
    """

    job_id: str  # of the job that the request is for; an endpoint may find that it is one that was there before
    path: str = ""
    job_in_path: str | None = None
    key_name: str | None = None  # whose API key it carries; None where the server has no keys
    received_s: float = field(default_factory=time.monotonic)

    KEY: ClassVar[str] = "stable_diffusion"  # in an ASGI scope
