"""Noise schedulers and noise levels by all of their names: diffusers' classes, short names, A1111's samplers. Imports no torch."""

from __future__ import annotations

# diffusers' class name -> the usual short names. "Karras" is DPM++ 2M with other noise levels, not a separate class.
SCHEDULERS: dict[str, tuple[str, ...]] = {
    "PNDMScheduler": ("PNDM", "PLMS"),
    "DDIMScheduler": ("DDIM",),
    "EulerDiscreteScheduler": ("Euler",),
    "EulerAncestralDiscreteScheduler": ("Euler a", "Euler ancestral"),
    "DPMSolverMultistepScheduler": ("DPM++ 2M",),
    "DPMSolverMultistepScheduler Karras": ("DPM++ 2M Karras",),
    "UniPCMultistepScheduler": ("UniPC",),
    "LMSDiscreteScheduler": ("LMS",),
    "HeunDiscreteScheduler": ("Heun",),
}


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


KARRAS = "Karras"
# Noise levels by A1111's names; None stands for the sampler's own. With Karras (2022) the scheduler is a separate key in SCHEDULERS.
SCHEDULES: dict[str, str | None] = {"Automatic": None, "Normal": None, "Uniform": None, KARRAS: KARRAS}
_SCHEDULE_BY_SPELLING = {"": None, **{_spelling(name): schedule for name, schedule in SCHEDULES.items()}}


def known_schedule(name: str) -> str | None:
    """Noise levels by A1111's name; None for the sampler's own. Raises ValueError, which lists the known names."""
    try:
        return _SCHEDULE_BY_SPELLING[_spelling(name)]
    except KeyError:
        raise ValueError(f"unknown noise levels {name[:60]!r}, allowed are {', '.join(SCHEDULES)}") from None


def sampler_of(scheduler: str) -> tuple[str, str | None]:
    """A1111's names for a noise scheduler: the sampler, and the noise levels if they are not the sampler's own."""
    name = SCHEDULERS.get(scheduler, (scheduler,))[0]  # a model's own scheduler may have no short name
    return (name.removesuffix(f" {KARRAS}"), KARRAS) if name.endswith(f" {KARRAS}") else (name, None)


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
