"""The format of tasks on their way to the model process and of the updates on their way back. No other module knows it.

A BentoML runner accepts any picklable argument but streams only text. So a task travels as plain values, and each update as one line with
the pixels in base64. Does not depend on HTTP or torch.
"""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from PIL import Image

from stable_diffusion.core.errors import ServiceError, error_of_type
from stable_diffusion.core.types import GeneratedImage, Progress, Task, Ticket


def pack_task(task: Task, ticket: Ticket, *, follow: bool = False) -> dict[str, Any]:
    """A task as plain values with images as (mode, size, bytes), its ticket, and whether to send progress too."""
    values = {field.name: _pack_image(getattr(task, field.name)) for field in fields(task)}
    return {"task": values, "ticket": asdict(ticket), "follow": follow}


def unpack_task(packed: dict[str, Any]) -> tuple[Task, Ticket, bool]:
    values = packed["task"]
    images = {name: Image.frombytes(*values[name]) for name in ("image", "mask") if values[name] is not None}
    return Task(**{**values, **images}), Ticket(**packed["ticket"]), packed["follow"]


def _pack_image(value: Any) -> Any:
    return (value.mode, value.size, value.tobytes()) if isinstance(value, Image.Image) else value


def pack_outcome(outcome: GeneratedImage | ServiceError) -> str:
    """One line of ASCII, which a transport may split anywhere: JSON and, after a tab, the pixels.

    The pixels are not part of the JSON, because json would scan them twice for characters to escape.
    """
    if isinstance(outcome, ServiceError):
        content: dict[str, Any] = {"error": outcome.facts()}
        pixels = ""
    else:
        content = {"size": outcome.image.size, "image": outcome.facts()}
        pixels = base64.b64encode(outcome.image.tobytes()).decode("ascii")
    return f"{json.dumps(content)}\t{pixels}\n"


def pack_progress(progress: Progress) -> str:
    preview = progress.preview
    packed = {
        "position": progress.position,
        "step": progress.step,
        "steps": progress.steps,
        "seconds_left": progress.seconds_left,
        "preview": None if preview is None else [preview.size, base64.b64encode(preview.tobytes()).decode("ascii")],
    }
    return json.dumps({"progress": packed}) + "\n"


@dataclass(frozen=True)
class TakenOn:
    """The first update: the task is in the engine's queue."""


_TAKEN_ON = "taken on"


def pack_taken_on() -> str:
    return json.dumps({_TAKEN_ON: True}) + "\n"


def unpack_update(line: str) -> TakenOn | Progress | GeneratedImage:
    """Unpack a line from a runner. Raises the error if the line contains one."""
    described, _, pixels = line.partition("\t")
    content = json.loads(described)
    if _TAKEN_ON in content:
        return TakenOn()
    if "progress" in content:
        values = content["progress"]
        if values["preview"] is not None:
            size, small = values["preview"]
            values["preview"] = Image.frombytes("RGB", tuple(size), base64.b64decode(small))
        return Progress(**values)
    if "error" in content:
        raise error_of_type(**content["error"])
    image = Image.frombytes("RGB", tuple(content["size"]), base64.b64decode(pixels))
    return GeneratedImage(image, **content["image"])
