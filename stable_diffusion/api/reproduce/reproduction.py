"""From an infotext to a request that draws the picture again, and what would differ all the same.

Knows nothing of HTTP, nor of the file that the infotext came in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from stable_diffusion.core.errors import InvalidRequest
from stable_diffusion.core.schedulers import known_schedule, sampler_of, scheduler_of
from stable_diffusion.core.types import GeneratedImage, Kind, Task
from stable_diffusion.images.infotext import LIBRARIES, PROGRAM, Infotext, library_versions, program_version
from stable_diffusion.models.folder import ModelFolder

T = TypeVar("T")


_KINDS: tuple[Kind, ...] = ("txt2img", "img2img", "inpaint")
_MAX_SHOWN_CHARACTERS = 40  # of a value that somebody else wrote
_MAX_SHOWN_NAMES = 8
# What `infotext.write` writes, all of which is drawn again or compared.
_KNOWN_NAMES = {
    "Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Model hash", "Model", "Denoising strength", "Guidance end", "Kind",
    "Input hash", "Mask hash", "Safety check", "Precision", "Device", "Version", *LIBRARIES,
}  # fmt: skip


@dataclass(frozen=True)
class Reproduction:
    """`fields` are those of the request model for `kind`; `differs` says what would differ, as far as it is known before drawing."""

    kind: Kind
    fields: dict[str, Any]
    differs: list[str]
    infotext: Infotext
    is_ours: bool  # drawn by this project: the prompts are to be taken as they stand


def reproduction_of(said: Infotext, model: ModelFolder) -> Reproduction:
    """Takes a moment when the model's hash is first asked for. Raises InvalidRequest where the infotext lacks or garbles what is needed."""
    values = said.values
    kind = _kind(values)
    scheduler, scheduler_differs = _scheduler(values, model)
    width, height = _value(values, "Size", _size)
    fields: dict[str, Any] = {
        "prompt": said.prompt,
        "negative_prompt": said.negative_prompt,
        "width": width,
        "height": height,
        "num_inference_steps": _value(values, "Steps", int),
        "guidance_scale": _value(values, "CFG scale", float),
        "guidance_end": _value(values, "Guidance end", float, "1"),
        "seed": _value(values, "Seed", int),
        "scheduler": scheduler,
    }
    if kind != "txt2img":
        fields["strength"] = _value(values, "Denoising strength", float)
    program = values.get("Version", "another program")
    is_ours = program.startswith(f"{PROGRAM} ")
    differs = [*_program_differs(program, is_ours), *_model_differs(values, model), *scheduler_differs]
    differs += [_differs(name, values[name], here) for name, here in library_versions().items() if values.get(name, here) != here]
    if unknown := [f"{_shown(name)} {_shown(value)}" for name, value in values.items() if not _is_known(name, value)]:
        more = f" and {len(unknown) - _MAX_SHOWN_NAMES} more" if len(unknown) > _MAX_SHOWN_NAMES else ""
        differs.append(f"not known here: {', '.join(unknown[:_MAX_SHOWN_NAMES])}{more}")
    return Reproduction(kind, {name: value for name, value in fields.items() if value is not None}, differs, said, is_ours)


def differs_in_input(said: Infotext, task: Task) -> list[str]:
    """Whether `task` starts from the input picture and the mask that the picture was drawn from."""
    hashes = {"Input hash": task.image_hash, "Mask hash": task.mask_hash}
    return [
        f"{_differs(name, said.values[name], here)} (another one, or prepared as other programs do: blurred, inverted or stretched)"
        for name, here in hashes.items()
        if here and said.values.get(name, here) != here
    ]


def has_its_mask(said: Infotext, task: Task) -> bool:
    """Whether `task` is drawn under the mask that the picture was drawn under, as far as its infotext says."""
    return said.values.get("Mask hash", task.mask_hash) == task.mask_hash


def differs_in_computing(said: Infotext, picture: GeneratedImage) -> list[str]:
    """What is known only once `picture` has been drawn again: in which precision, and by what."""
    drawn_on = {"Precision": picture.dtype, "Device": picture.device}
    return [_differs(name, said.values[name], here) for name, here in drawn_on.items() if here and said.values.get(name, here) != here]


def _kind(values: Mapping[str, str]) -> Kind:
    """A1111 does not say it, but by what else it says."""
    said = values.get("Kind")
    if said is None and "Denoising strength" in values and not any(name.startswith("Hires") for name in values):
        return "inpaint" if "Mask blur" in values else "img2img"
    for kind in _KINDS:
        if kind == (said or "txt2img"):
            return kind
    raise _unreadable("Kind", values["Kind"])


def _scheduler(values: Mapping[str, str], model: ModelFolder) -> tuple[str | None, list[str]]:
    """The noise scheduler, None for the model's own, and what is not known here."""
    sampler, schedule = values.get("Sampler", ""), values.get("Schedule type", "")
    if (sampler, _levels(schedule)) == sampler_of(model.scheduler):
        return None, []  # it may be one that is not among ours
    try:
        scheduler, has_schedule = scheduler_of(sampler, schedule)
    except ValueError:
        return None, [f"Sampler: {_shown(f'{sampler} {schedule}'.strip() or 'not said')} is not known here, {model.scheduler} is used"]
    return scheduler, [] if has_schedule else [f"Schedule type: {_shown(schedule)} is not known here"]


def _levels(schedule: str) -> str | None:
    """As `sampler_of` has them; those that are not known here as they are named."""
    try:
        return known_schedule(schedule)
    except ValueError:
        return schedule


def _program_differs(program: str, is_ours: bool) -> list[str]:
    if not is_ours:
        return [f"Version: drawn by {_shown(program)}, which draws other noise and reads prompts in its own way"]
    return [] if program == program_version() else [_differs("Version", program, program_version())]


def _model_differs(values: Mapping[str, str], model: ModelFolder) -> list[str]:
    said = values.get("Model hash", "")
    if said == model.hash:
        return []
    drawn_by = f"{_shown(values.get('Model', 'a model without a name'))} ({_shown(said) or 'without a hash'})"
    return [_differs("Model", drawn_by, f"{model.name} ({model.hash})")]


def _is_known(name: str, value: str) -> bool:
    return name in _KNOWN_NAMES or (name, value) == ("Clip skip", "1")


def _differs(name: str, said: str, here: str) -> str:
    return f"{name}: {_shown(said)}, here {here}"


def _shown(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else f"{text[:_MAX_SHOWN_CHARACTERS]}..."


def _value(values: Mapping[str, str], name: str, read: Callable[[str], T], default: str | None = None) -> T:
    said = values.get(name, default)
    if said is None:
        raise InvalidRequest(f"picture: its infotext does not say {name}", field="picture")
    try:
        return read(said)
    except ValueError:
        raise _unreadable(name, said) from None


def _size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


def _unreadable(name: str, said: str) -> InvalidRequest:
    return InvalidRequest(f"picture: its infotext says {name}: {_shown(said)}, which cannot be read", field="picture")
