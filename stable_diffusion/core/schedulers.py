"""Noise schedulers and noise levels by all of their names: diffusers' classes, short names, A1111's samplers. Imports no torch."""

from __future__ import annotations

from typing import Any

# Words that may follow the class in a scheduler's name -> the options that they add to the model's configuration.
SCHEDULER_OPTIONS: dict[str, dict[str, Any]] = {
    "3M": {"solver_order": 3},
    "SDE": {"algorithm_type": "sde-dpmsolver++"},
    "Heun": {"solver_type": "heun"},
    "Karras": {"use_karras_sigmas": True, "use_exponential_sigmas": False, "use_beta_sigmas": False},
    "Exponential": {"use_karras_sigmas": False, "use_exponential_sigmas": True, "use_beta_sigmas": False},
    "Trailing": {"timestep_spacing": "trailing"},
}
# Options that a class always gets. Without this one diffusers sets it itself, and warns at each image.
_CLASS_OPTIONS: dict[str, dict[str, Any]] = {"DPMSolverSinglestepScheduler": {"lower_order_final": True}}
# diffusers' class name and options -> the usual short names, A1111's first. If an A1111 client names noise levels and no sampler, it gets
# the first scheduler with these levels.
SCHEDULERS: dict[str, tuple[str, ...]] = {
    "PNDMScheduler": ("PNDM", "PLMS"),
    "DDIMScheduler": ("DDIM",),
    "EulerDiscreteScheduler": ("Euler",),
    "EulerAncestralDiscreteScheduler": ("Euler a", "Euler ancestral"),
    "DPMSolverMultistepScheduler": ("DPM++ 2M",),
    "DPMSolverMultistepScheduler Karras": ("DPM++ 2M Karras",),
    "UniPCMultistepScheduler": ("UniPC",),
    "LMSDiscreteScheduler": ("LMS",),
    "LMSDiscreteScheduler Karras": ("LMS Karras",),
    "HeunDiscreteScheduler": ("Heun",),
    "KDPM2DiscreteScheduler": ("DPM2", "KDPM2"),
    "KDPM2DiscreteScheduler Karras": ("DPM2 Karras",),
    "KDPM2AncestralDiscreteScheduler": ("DPM2 a", "DPM2 ancestral", "KDPM2 a"),
    "KDPM2AncestralDiscreteScheduler Karras": ("DPM2 a Karras",),
    "DPMSolverSinglestepScheduler": ("DPM++ 2S", "DPM++ singlestep"),
    "DPMSolverSinglestepScheduler SDE": ("DPM++ SDE",),
    "DPMSolverSinglestepScheduler SDE Karras": ("DPM++ SDE Karras",),
    "DPMSolverMultistepScheduler SDE": ("DPM++ 2M SDE",),
    "DPMSolverMultistepScheduler SDE Karras": ("DPM++ 2M SDE Karras",),
    "DPMSolverMultistepScheduler SDE Exponential": ("DPM++ 2M SDE Exponential",),
    "DPMSolverMultistepScheduler SDE Heun": ("DPM++ 2M SDE Heun",),
    "DPMSolverMultistepScheduler SDE Heun Karras": ("DPM++ 2M SDE Heun Karras",),
    "DPMSolverMultistepScheduler SDE Heun Exponential": ("DPM++ 2M SDE Heun Exponential",),
    "DPMSolverMultistepScheduler 3M SDE": ("DPM++ 3M SDE",),
    "DPMSolverMultistepScheduler 3M SDE Karras": ("DPM++ 3M SDE Karras",),
    "DPMSolverMultistepScheduler 3M SDE Exponential": ("DPM++ 3M SDE Exponential",),
    "LCMScheduler": ("LCM",),
    "TCDScheduler": ("TCD",),
    "DDIMScheduler Trailing": ("DDIM SGM Uniform", "DDIM trailing"),
    "EulerDiscreteScheduler Trailing": ("Euler SGM Uniform", "Euler trailing"),
    "EulerAncestralDiscreteScheduler Trailing": ("Euler a SGM Uniform", "Euler a trailing"),
}
_SECOND_ORDER = ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
_WITH_ETA = ("DDIMScheduler", "TCDScheduler")


def class_and_options(scheduler: str) -> tuple[str, dict[str, Any]]:
    """diffusers' class for a key of SCHEDULERS, or for a model's own class, and the options that change the model's configuration."""
    name, *words = scheduler.split(" ")
    options = {option: value for word in words for option, value in SCHEDULER_OPTIONS[word].items()}
    return name, _CLASS_OPTIONS.get(name, {}) | options


def unet_calls_of_a_step(scheduler: str) -> int:
    return 2 if class_and_options(scheduler)[0] in _SECOND_ORDER else 1


def has_eta(scheduler: str) -> bool:
    """Whether `eta` sets how much noise its steps add."""
    return class_and_options(scheduler)[0] in _WITH_ETA


def _spelling(name: str) -> str:
    """Normalize a name: case, spaces, hyphens and underscores do not matter."""
    return "".join(character for character in name.lower() if character.isalnum() or character == "+")


_SCHEDULER_BY_SPELLING = {_spelling(name): scheduler for scheduler, short_names in SCHEDULERS.items() for name in (scheduler, *short_names)}


def known_scheduler(name: str) -> str:
    """The key in SCHEDULERS for any name of a scheduler. Raises ValueError, which lists the known names."""
    try:
        return _SCHEDULER_BY_SPELLING[_spelling(name)]
    except KeyError:
        allowed = ", ".join(short_names[0] for short_names in SCHEDULERS.values())
        raise ValueError(f"unknown scheduler {name[:60]!r}, allowed are {allowed} or diffusers' class names") from None


# A1111's names of noise levels -> their names here; None: the sampler's own. A scheduler with other levels is a key of SCHEDULERS that ends
# with their name.
SCHEDULES: dict[str, str | None] = {
    "Automatic": None,
    "Normal": None,
    "Uniform": None,
    "Karras": "Karras",
    "Exponential": "Exponential",
    "SGM Uniform": "Trailing",
}
_SCHEDULE_OF_LEVELS = {levels: schedule for schedule, levels in SCHEDULES.items() if levels}
_SCHEDULE_BY_SPELLING = {"": None, **{_spelling(name): name if levels else None for name, levels in SCHEDULES.items()}}


def known_schedule(name: str) -> str | None:
    """A key of SCHEDULES; None for the sampler's own noise levels. Raises ValueError, which lists the known names."""
    try:
        return _SCHEDULE_BY_SPELLING[_spelling(name)]
    except KeyError:
        raise ValueError(f"unknown noise levels {name[:60]!r}, allowed are {', '.join(SCHEDULES)}") from None


def sampler_of(scheduler: str) -> tuple[str, str | None]:
    """A1111's names for a noise scheduler: the sampler, and the noise levels if they are not the sampler's own."""
    name, _, last = scheduler.rpartition(" ")
    schedule = _SCHEDULE_OF_LEVELS.get(last)
    name = name if schedule else scheduler
    return SCHEDULERS.get(name, (name,))[0], schedule  # a model's own scheduler may have no short name


def scheduler_of(sampler: str, schedule: str) -> tuple[str, bool]:
    """The key in SCHEDULERS for A1111's sampler and noise levels, and whether that sampler supports them; if not, it keeps its own.

    Raises ValueError for an unknown sampler.
    """
    scheduler = known_scheduler(sampler)
    try:
        levels = known_schedule(schedule)
    except ValueError:
        return scheduler, False
    if levels is None:
        return scheduler, True
    found = next((one for one in SCHEDULERS if sampler_of(one) == (sampler_of(scheduler)[0], levels)), None)
    return found or scheduler, found is not None
