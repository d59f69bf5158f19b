"""How a task crosses the process hop and how its outcome comes back: the only place that knows both sides' form.

A BentoML runner takes any picklable argument but streams text only, so a task travels as plain values and an
outcome as one JSON line with the pixels in base64. Knows nothing of HTTP; loads no torch by itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from typing import TYPE_CHECKING, Any

from PIL import Image

from stable_diffusion.engine.job import Picture, Progress, Task
from stable_diffusion.engine.records import CapRecord, Record, StepRecord
from stable_diffusion.errors import ServiceError, error_of_type
from stable_diffusion.jobs import Ticket
from stable_diffusion.kept_caps import keep, recall
from stable_diffusion.limits import Limits
from stable_diffusion.metrics import counting
from stable_diffusion.runner_state import Placement, RunnerState, StepCap

if TYPE_CHECKING:
    from stable_diffusion.engine.calibration import Cap
    from stable_diffusion.engine.denoiser import Denoiser
    from stable_diffusion.engine.engine import Engine
    from stable_diffusion.pipelines import Parts, Precision
    from stable_diffusion.weights import ModelFolder


logger = logging.getLogger("stable_diffusion")

CUDA_GRAPHS_VARIABLE = "SD_CUDA_GRAPHS"


def start_engine(
    model: ModelFolder,
    precision: Precision,
    max_batch_size: int,
    on_step: Callable[[StepRecord], None] | None = None,
    runner_index: int | None = None,
    limits: Limits | None = None,
    make_denoiser: Callable[[Parts], Denoiser] | None = None,
) -> Engine:
    """Load the model, find out how many pictures should share a step, and start the engine; returns when it can draw.

    `runner_index`: BentoML's number of this process, under which it says how far it is; None if nobody would read that.
    `limits`: how much work is taken on, and when a step counts as stuck, which ends this process; None: no limits.
    `make_denoiser`: of tests, which have it fail.
    """
    # Imported here because API workers import this module too and must stay without torch.
    from stable_diffusion.engine.calibration import cap_for_size
    from stable_diffusion.engine.denoiser import Denoiser
    from stable_diffusion.engine.engine import Engine
    from stable_diffusion.engine.watchdog import Watchdog
    from stable_diffusion.engine.workload import NO_LIMITS, QueueLimits
    from stable_diffusion.pipelines import load

    width, height = model.native_width, model.native_height
    caps: list[Cap] = []
    step_seconds: list[float] = []
    state = RunnerState(runner_index, precision, model.name)
    state.enter("starting")
    count = counting()

    def load_and_warm_up() -> Denoiser:
        state.enter("loading weights")
        parts = load(model, precision)
        state.placement = _placement(parts)
        state.enter("warming up")
        denoiser = (make_denoiser or Denoiser)(parts)
        step_seconds.append(denoiser.warm_up(width, height))
        if os.environ.get(CUDA_GRAPHS_VARIABLE) == "1":
            _record_steps(denoiser, parts, width, height, max_batch_size)
        state.enter("measuring the cap")
        cap = _recall_or_measure(denoiser, parts, model, max_batch_size)
        logger.info("Up to %d pictures of %dx%d share a step: %s.", cap.jobs, width, height, cap.reason)
        state.set_cap(StepCap(width, height, cap.jobs, cap.reason))
        caps.append(cap)
        return denoiser

    def cap_for(size: tuple[int, int]) -> int:
        return cap_for_size(caps[0], width * height, size[0] * size[1], max_batch_size)

    def note_step(record: StepRecord) -> None:
        count(record)
        if on_step is not None:
            on_step(record)

    def note(record: Record) -> None:
        count(record)
        if isinstance(record, CapRecord):
            state.set_cap(StepCap(record.width, record.height, record.jobs, f"{record.tried} pictures did not fit into memory"))

    queue = NO_LIMITS if limits is None else QueueLimits(limits.queue_s, limits.queue_pictures)
    watchdog = None if limits is None else Watchdog(limits.stuck_step_s)
    engine = Engine(load_and_warm_up, max_batch_size, note_step, cap_for, note, queue, watchdog)
    engine.assume_step(height, width, step_seconds[0])
    state.enter("ready")
    return engine


def _placement(parts: Parts) -> Placement:
    from stable_diffusion.pipelines import device_name

    versions = {name: metadata.version(name) for name in ("torch", "diffusers", "transformers", "bentoml")}
    versions["python"] = platform.python_version()
    return Placement(device_name(parts.device), str(parts.dtype).removeprefix("torch."), versions)


def _record_steps(denoiser: Denoiser, parts: Parts, width: int, height: int, max_batch_size: int) -> None:
    from stable_diffusion.engine.recorded import CudaGraphs

    if parts.device.type != "cuda":
        logger.warning("%s=1 is ignored: there is no GPU.", CUDA_GRAPHS_VARIABLE)
        return
    rows = denoiser.record_steps(CudaGraphs(), width, height, max_batch_size)
    logger.info("Steps of up to %d rows of %dx%d are recorded as CUDA graphs.", rows, width, height)


def _recall_or_measure(denoiser: Denoiser, parts: Parts, model: ModelFolder, max_batch_size: int) -> Cap:
    import torch

    from stable_diffusion.engine.calibration import choose_cap
    from stable_diffusion.pipelines import device_name

    width, height = model.native_width, model.native_height
    key: dict[str, str | int] = {
        "device": device_name(parts.device),
        "dtype": str(parts.dtype),
        "torch": torch.__version__,
        "unet": hashlib.sha256(parts.unet.to_json_string().encode()).hexdigest(),
        "width": width,
        "height": height,
        "max_batch_size": max_batch_size,
        CUDA_GRAPHS_VARIABLE: os.environ.get(CUDA_GRAPHS_VARIABLE, ""),
    }
    if (cap := recall(key)) is not None:
        return cap
    cap = choose_cap(lambda jobs: denoiser.step_seconds(jobs, width, height), max_batch_size)
    if max_batch_size > 1 and not cap.limited_by_memory:
        keep(key, cap)
    return cap


def pack_task(task: Task, ticket: Ticket, *, follow: bool = False) -> dict[str, Any]:
    """A task as plain values, pictures as (mode, size, bytes), for whom it is, and whether its progress is wanted too."""
    values = {field.name: _pack_image(getattr(task, field.name)) for field in fields(task)}
    return {"task": values, "ticket": asdict(ticket), "follow": follow}


def unpack_task(packed: dict[str, Any]) -> tuple[Task, Ticket, bool]:
    values = packed["task"]
    images = {name: Image.frombytes(*values[name]) for name in ("image", "mask") if values[name] is not None}
    return Task(**{**values, **images}), Ticket(**packed["ticket"]), packed["follow"]


def _pack_image(value: Any) -> Any:
    return (value.mode, value.size, value.tobytes()) if isinstance(value, Image.Image) else value


def pack_outcome(outcome: Picture | ServiceError) -> str:
    """One line of ASCII, so that it does not matter where a transport cuts it: JSON, and after a tab the pixels.

    As a JSON string they would be looked through for what has to be escaped, twice.
    """
    if isinstance(outcome, ServiceError):
        content: dict[str, Any] = {"error": {"type": outcome.type, "message": outcome.message, "retry_after_s": outcome.retry_after_s}}
        pixels = ""
    else:
        content = {
            "size": outcome.image.size,
            "flagged": outcome.flagged,
            "dropped_prompt": outcome.dropped_prompt,
            "dropped_negative_prompt": outcome.dropped_negative_prompt,
            "device": outcome.device,
            "dtype": outcome.dtype,
            "decoded_again": outcome.decoded_again,
            "waited_s": outcome.waited_s,
        }
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
    """The task is in the engine's queue. What comes before it is no answer to whoever asked."""


_TAKEN_ON = "taken on"


def pack_taken_on() -> str:
    return json.dumps({_TAKEN_ON: True}) + "\n"


def unpack_news(line: str) -> TakenOn | Progress | Picture:
    """What a runner has sent. Raises the error if it sent one."""
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
    return Picture(
        image=Image.frombytes("RGB", tuple(content["size"]), base64.b64decode(pixels)),
        flagged=content["flagged"],
        dropped_prompt=content["dropped_prompt"],
        dropped_negative_prompt=content["dropped_negative_prompt"],
        device=content["device"],
        dtype=content["dtype"],
        decoded_again=content["decoded_again"],
        waited_s=content["waited_s"],
    )
