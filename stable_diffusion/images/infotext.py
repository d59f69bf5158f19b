"""Writes and reads the text that says how an image was generated, in A1111's form ("infotext").

Does not depend on image files; `api/reproduce` decides what can be generated again.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from stable_diffusion import __version__
from stable_diffusion.core.errors import InvalidRequest
from stable_diffusion.core.prompt_syntax import without_lora_tags
from stable_diffusion.core.schedulers import sampler_of
from stable_diffusion.core.types import GeneratedImage, Task
from stable_diffusion.images.description import BYTE_ORDER_MARK
from stable_diffusion.models.folder import ModelFolder

PROGRAM = "stable-diffusion-bentoml"  # followed by the version; A1111 takes a bare number for its own version
LIBRARIES = ("torch", "diffusers")  # whose versions may change an image
MAX_CHARACTERS = 2**16  # of an infotext; two prompts of maximum length, written twice, take half of it
_NEGATIVE = "Negative prompt:"
_FEWEST_PAIRS = 3  # on the last line; A1111 treats a line with fewer as part of the prompt
_STEPS = "Steps"  # the first name on the last line
_TEMPLATES = ("Template:", "Negative Template:")  # lines after the last one, with the templates of dynamic prompts
_MAX_SHOWN_CHARACTERS = 60
# A name, and a value that is a JSON string or extends to the next comma. Equivalent to A1111's own expression.
_PAIR = re.compile(r'\s*(?P<name>\w[\w \-/]+):\s*(?P<value>"(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


@dataclass(frozen=True)
class Infotext:
    """A parsed infotext: both prompts, and the values of its last line by name, such as "CFG scale"."""

    prompt: str
    negative_prompt: str
    values: Mapping[str, str]


def write(task: Task, image: GeneratedImage, model: ModelFolder) -> str:
    """Everything that determines the image of `task`. An input image and a mask appear only as hashes of their scaled versions.

    Values that A1111's readers assume by default are left out.
    """
    values = _values(task, image, model)
    prompts = f"{task.prompt}\n{_NEGATIVE} {task.negative_prompt}" if task.negative_prompt else task.prompt
    if _prompts_of(_without_mark(prompts).lstrip()) != (task.prompt, task.negative_prompt):
        # A line looks like the start of another section, or readers would drop white space.
        values["Exact prompt"] = task.prompt
        if task.negative_prompt:
            values["Exact negative prompt"] = task.negative_prompt
    last_line = ", ".join(f"{name}: {_quoted(value)}" for name, value in values.items())
    return f"{prompts}\n{last_line}".strip()


def _values(task: Task, image: GeneratedImage, model: ModelFolder) -> dict[str, str]:
    sampler, schedule = sampler_of(task.scheduler)
    computed_on = {"Precision": image.dtype, "Device": image.device}
    values = {
        _STEPS: str(task.num_inference_steps),
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": _number(task.guidance_scale),
        "Seed": str(task.seed),
        "Size": f"{task.width}x{task.height}",
        "Model hash": model.hash,
        "Model": model.name,
        "Denoising strength": None if task.kind == "txt2img" else _number(task.strength),
        "Clip skip": None if task.clip_skip == 1 else str(task.clip_skip),
        "Lora hashes": lora_hashes(task) or None,
        "Loras": _loras_of_field(task) or None,
        "Prompt syntax": None if task.prompt_syntax == "plain" else task.prompt_syntax,
        "Eta DDIM": _number(task.eta) if task.eta else None,  # A1111's name for every sampler that has it
        "Guidance end": None if task.guidance_end == 1 else _number(task.guidance_end),
        "Kind": task.kind,
        "Input hash": task.image_hash,
        "Mask hash": task.mask_hash,
        "Safety check": None if task.safety_check else "false",
        **{name: value or None for name, value in computed_on.items()},
        **library_versions(),
        "Version": program_version(),
    }
    return {name: value for name, value in values.items() if value is not None}


def lora_hashes(task: Task) -> str:
    """The hash of each LoRA's file, as A1111 writes them."""
    return ", ".join(f"{name}: {content_hash}" for name, content_hash in {one.name: one.hash for one in task.loras}.items())


def _loras_of_field(task: Task) -> str:
    """The LoRAs that have no tag in the prompt, with their weights."""
    tags = without_lora_tags(task.prompt)[1] if task.prompt_syntax == "a1111" else ()
    in_tags = sum(1 for tag in tags if tag.unet_weight or tag.text_encoder_weight)  # others are not in the task either
    return ", ".join(f"{one.name}: {_number(one.unet_weight)}" for one in task.loras[: len(task.loras) - in_tags])


def read(text: str, field: str = "infotext") -> Infotext:
    """Parse an infotext by `write` or A1111. Raises InvalidRequest, naming `field`, if the text is not one."""
    if len(text) > MAX_CHARACTERS:
        raise InvalidRequest(f"{field}: the infotext has {len(text)} characters, at most {MAX_CHARACTERS} are allowed", field=field)
    prompts, values = _prompts_and_values(_without_mark(text).strip())
    if len(values) < _FEWEST_PAIRS:
        raise InvalidRequest(
            f"{field}: not an infotext: the last line must hold the generation parameters (Steps: 20, Sampler: Euler a, ...), "
            f"got {_shown(text)}",
            field=field,
        )
    prompt, negative_prompt = _prompts_of(prompts)
    if "Exact prompt" in values:
        prompt, negative_prompt = values.pop("Exact prompt"), values.pop("Exact negative prompt", "")
    return Infotext(prompt, negative_prompt, values)


def _prompts_and_values(text: str) -> tuple[str, dict[str, str]]:
    """Split at the last line, or at the last one with Steps that templates follow. A template may itself look like such a line."""
    prompts, _, last_line = text.rpartition("\n")
    values = _pairs(last_line)
    if _STEPS in values:
        return prompts, values
    lines = text.split("\n")
    for number in range(len(lines) - 1, 0, -1):
        if lines[number].startswith(_TEMPLATES):
            before = _pairs(lines[number - 1])
            if _STEPS in before and len(before) >= _FEWEST_PAIRS:
                return "\n".join(lines[: number - 1]), before
    return prompts, values


def _without_mark(text: str) -> str:
    """Remove the byte order mark with which some programs begin a text."""
    return text.lstrip(BYTE_ORDER_MARK)


def _shown(text: str) -> str:
    """The last line in quotes, shortened."""
    line = text.strip().rpartition("\n")[2]
    return repr(line if len(line) <= _MAX_SHOWN_CHARACTERS else f"{line[:_MAX_SHOWN_CHARACTERS]}...")


def program_version() -> str:
    return f"{PROGRAM} {__version__}"


@functools.cache
def library_versions() -> dict[str, str]:
    """The versions of the installed libraries by name, without importing them."""
    return {name: metadata.version(name) for name in LIBRARIES}


def _prompts_of(lines: str) -> tuple[str, str]:
    """The prompt and, from the first line with that prefix on, the negative prompt. White space around each line is lost."""
    prompt: list[str] = []
    negative: list[str] = []
    current = prompt
    for line in (part.strip() for part in lines.split("\n")):
        if line.startswith(_NEGATIVE):
            current = negative
            line = line.removeprefix(_NEGATIVE).strip()
        current.append(line)
    return "\n".join(prompt), "\n".join(negative)


def _pairs(line: str) -> dict[str, str]:
    """Text that is not a pair is skipped up to the next comma, so that the time is linear in the line's length."""
    pairs: dict[str, str] = {}
    position = 0
    while position < len(line):
        if match := _PAIR.match(line, position):
            pairs[match["name"]] = _unquoted(match["value"])
            position = match.end()
        else:
            comma = line.find(",", position)
            position = len(line) if comma < 0 else comma + 1
    return pairs


def _quoted(value: str) -> str:
    if value != value.strip() or any(character in value for character in ',:\n"'):
        return json.dumps(value, ensure_ascii=False)
    return value


def _unquoted(value: str) -> str:
    if not (len(value) > 2 and value[0] == value[-1] == '"'):
        return value
    try:
        text = str(json.loads(value))
    except ValueError:
        return value
    return text.encode("utf-8", "replace").decode("utf-8")  # JSON can contain a lone surrogate, headers and prompts cannot


def _number(value: float) -> str:
    """The shortest exact form: 7 and not 7.0."""
    return str(int(value)) if value == int(value) else repr(value)
