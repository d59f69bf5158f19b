"""Plain data that crosses package and process borders: what to generate, for whom, how far it is, and the finished image.

The types do not depend on how an image is generated, sent or stored.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from stable_diffusion.core.settings import MAX_TIMEOUT_S

if TYPE_CHECKING:
    from PIL import Image


Precision = Literal["fp32", "fp16"]
ImageFormat = Literal["jpeg", "png", "webp"]
Kind = Literal["txt2img", "img2img", "inpaint"]
PromptSyntax = Literal["plain", "a1111"]


class LoraChoice(NamedTuple):
    """A LoRA that a task uses. `hash` identifies the file's content (models/loras.py); `size_bytes`: of its values as float32."""

    name: str
    unet_weight: float
    text_encoder_weight: float
    hash: str
    size_bytes: int


@dataclass(frozen=True)
class Task:
    """What to generate. Every value is resolved and within its limits. Sizes in pixels; the image and the mask already have that size."""

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
    guidance_end: float = 1.0  # the fraction of the steps that use guidance
    eta: float = 0.0  # how much noise a step adds, where the scheduler has it
    preview_every_steps: int = 0  # 0: none
    metadata: bool = True  # whether the image file says how it was generated
    strength: float = 1.0  # img2img and inpaint
    prompt_syntax: PromptSyntax = "plain"  # of both prompts; without tags for LoRAs
    parts: int = 1  # of the prompt, joined with AND
    clip_skip: int = 1  # 1: the text encoder's last layer
    loras: tuple[LoraChoice, ...] = ()
    cut_prompts: bool = False  # drop excess tokens and report them, instead of failing
    image: Image.Image | None = None  # RGB; img2img and inpaint
    mask: Image.Image | None = None  # L, white is repainted; inpaint
    image_hash: str | None = None  # identifies the input image where the image itself is not kept
    mask_hash: str | None = None


@dataclass(frozen=True)
class GeneratedImage:
    """The result of a job. `flagged` is None if no safety check ran."""

    image: Image.Image
    flagged: bool | None
    dropped_prompt: str  # the part beyond the text encoder's token limit, "" if none
    dropped_negative_prompt: str
    device: str = ""  # "cpu" or the GPU's name; "" if unknown
    dtype: str = ""  # of the computation, such as "float32"; "" if unknown
    decoded_again: bool = False  # in float32, because the first result was black or not finite
    tiled: bool = False  # encoded or decoded in overlapping tiles, because the whole did not fit into memory
    waited_s: float | None = None  # until its first step; None if unknown

    def facts(self) -> dict[str, Any]:
        """Every field except the image, as plain values: `GeneratedImage(image, **facts)` is the same again."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "image"}


@dataclass(frozen=True)
class Progress:
    """The state of a running job. `position`: its place among the jobs that wait for their first step, 0 for all others."""

    position: int
    step: int
    steps: int
    seconds_left: float
    preview: Image.Image | None = None  # an eighth of the image's size


@dataclass(frozen=True)
class Ticket:
    """For whom a task runs. `index`: the number of the image in its job. `timeout_s`: how long it may take from now.

    An asynchronous task runs to its end even if no client waits, and its image is kept. `attempt` grows when a job that machines share is
    taken away from one of them. `key_name` and `client_address` are for the request log, as the request's own line has them.
    """

    job_id: str
    owner: str
    index: int = 0
    asynchronous: bool = False
    timeout_s: float = MAX_TIMEOUT_S
    attempt: int = 0
    key_name: str | None = None
    client_address: str | None = None


@dataclass
class RequestContext:
    """What the front door knows about a request before an endpoint handles it.

    `path` is the path that was asked for; BentoML's metrics see the route's template. `job_in_path` is the job that it names, if any.
    """

    job_id: str  # of the request's job; an endpoint replaces it if the request refers to an existing job
    path: str = ""
    job_in_path: str | None = None
    key_name: str | None = None  # of the request's API key; None if the server has no keys
    received_s: float = field(default_factory=time.monotonic)

    KEY: ClassVar[str] = "stable_diffusion"  # in the ASGI scope
