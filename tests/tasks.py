"""Tasks as tests ask for them."""

from __future__ import annotations

from PIL import Image

from stable_diffusion.api.context import Served
from stable_diffusion.core.safety import SafetyPolicy
from stable_diffusion.core.types import Task
from stable_diffusion.models.folder import ModelFolder
from stable_diffusion.models.loras import Loras


def make_task(**changes: object) -> Task:
    """A small text-to-image task with some values changed."""
    values: dict[str, object] = {
        "kind": "txt2img",
        "prompt": "a red circle on a blue background",
        "negative_prompt": "",
        "width": 64,
        "height": 64,
        "num_inference_steps": 8,
        "guidance_scale": 7.5,
        "seed": 1,
        "scheduler": "PNDMScheduler",
        "safety_check": True,
    }
    return Task(**(values | changes))  # type: ignore[arg-type]


def task_of_kind(picture: Image.Image, mask: Image.Image, *, kind: object = "txt2img", **changes: object) -> Task:
    """A task as of `make_task`, with the inputs that its kind has; txt2img has no strength either."""
    if kind == "txt2img":
        return make_task(**{name: value for name, value in changes.items() if name != "strength"})
    inputs: dict[str, object] = {"image": picture, "mask": mask} if kind == "inpaint" else {"image": picture}
    return make_task(**(changes | inputs | {"kind": kind}))


def served(model: ModelFolder, policy: SafetyPolicy = "default-on", loras: Loras | None = None) -> Served:
    """What requests are resolved against: by default a server without LoRAs."""
    found = loras or Loras({}, {})
    return Served(model, policy, lambda: found)
