"""Tasks as tests ask for them."""

from __future__ import annotations

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


def served(model: ModelFolder, policy: SafetyPolicy = "default-on", loras: Loras | None = None) -> Served:
    """What requests are resolved against: by default a server without LoRAs."""
    found = loras or Loras({}, {})
    return Served(model, policy, lambda: found)
