"""The start of a model process: load the model, measure how many images share a step, start the engine.

The functions import the engine: API workers import this module too and must not import torch.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import bentoml

from stable_diffusion.core.settings import Limits, read_limits, read_settings
from stable_diffusion.core.telemetry import BatchLimitRecord, Record, StepRecord
from stable_diffusion.models.folder import model_of_service
from stable_diffusion.runner.execution import set_up_execution
from stable_diffusion.runner.measurement_cache import Key, keep, recall
from stable_diffusion.runner.process import ModelProcess
from stable_diffusion.state.metrics import counting
from stable_diffusion.state.runner_status import Placement, RunnerState, StepBatchLimit
from stable_diffusion.state.shared_state import open_state

if TYPE_CHECKING:
    from stable_diffusion.core.types import Precision
    from stable_diffusion.engine.calibration import BatchLimit
    from stable_diffusion.engine.denoiser import Denoiser
    from stable_diffusion.engine.engine import Engine
    from stable_diffusion.engine.loading import Parts
    from stable_diffusion.models.folder import ModelFolder

logger = logging.getLogger("stable_diffusion")


def start_model_process(
    service_folder: Path, precision: Precision, max_batch_size: int, make_denoiser: Callable[[Parts], Denoiser] | None = None
) -> ModelProcess:
    """Load the model that the service in `service_folder` serves and start its engine. Returns when it can generate.

    `make_denoiser`: for tests, which make it fail.
    """
    _import_engine()
    index = bentoml.server_context.worker_index or 0
    limits = read_limits(os.environ)
    model = model_of_service(service_folder, os.environ)
    engine = start_engine(model, precision, max_batch_size, runner_index=index, limits=limits, make_denoiser=make_denoiser)
    return ModelProcess(engine, open_state(os.environ).jobs, index)


def _import_engine() -> None:
    """Import all that generates: some 3,800 modules, torch, diffusers and transformers among them.

    The garbage collector waits meanwhile: it would look through the modules a hundred times and find nothing, which takes a sixth of the
    imports' time. Later it leaves them out, so it does not hold up a step for a quarter of a second.
    """
    gc.disable()
    try:
        from stable_diffusion.engine import denoiser, engine  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


def start_engine(
    model: ModelFolder,
    precision: Precision,
    max_batch_size: int,
    on_step: Callable[[StepRecord], None] | None = None,
    runner_index: int | None = None,
    limits: Limits | None = None,
    make_denoiser: Callable[[Parts], Denoiser] | None = None,
) -> Engine:
    """Load the model, determine how many images share a step, and start the engine. Returns when it can generate.

    `on_step`: for benchmarks, which count steps. `make_denoiser`: for tests, which make it fail.
    `runner_index`: BentoML's number of this process, under which it publishes its status; None: it publishes no status.
    `limits`: how much work is accepted, and after how long a stuck step ends this process; None: no limits.
    """
    from stable_diffusion.engine.admission import NO_LIMITS, QueueLimits
    from stable_diffusion.engine.calibration import batch_limit_for_size
    from stable_diffusion.engine.denoiser import Denoiser
    from stable_diffusion.engine.engine import Engine
    from stable_diffusion.engine.loading import load
    from stable_diffusion.engine.watchdog import Watchdog

    setting = read_settings(os.environ).execution
    watchdog = None if limits is None else Watchdog(limits.stuck_step_s)
    width, height = model.native_width, model.native_height
    batch_limits: list[BatchLimit] = []
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
        denoiser.measure_decoding(width, height)
        state.enter("measuring the cap")  # a value that clients of /status see
        key = _conditions(parts, model, max_batch_size)

        def batch_limit_in(way: str) -> BatchLimit:
            return _recall_or_measure_batch_limit(denoiser, model, max_batch_size, key | {"execution": way})

        state.execution, batch_limit = set_up_execution(
            denoiser,
            parts.device.type,
            str(parts.dtype),
            (width, height),
            max_batch_size,
            setting,
            key,
            batch_limit_in,
            step_seconds[0],
            watchdog,
        )
        logger.info("Up to %d images of %dx%d share a step: %s.", batch_limit.jobs, width, height, batch_limit.reason)
        state.set_batch_limit(StepBatchLimit(width, height, batch_limit.jobs, batch_limit.reason))
        batch_limits.append(batch_limit)
        return denoiser

    def batch_limit_for(size: tuple[int, int]) -> int:
        return batch_limit_for_size(batch_limits[0], width * height, size[0] * size[1], max_batch_size)

    def note_step(record: StepRecord) -> None:
        count(record)
        if on_step is not None:
            on_step(record)

    def note(record: Record) -> None:
        count(record)
        if isinstance(record, BatchLimitRecord):
            state.set_batch_limit(
                StepBatchLimit(record.width, record.height, record.jobs, f"{record.tried} images did not fit into memory")
            )

    queue = NO_LIMITS if limits is None else QueueLimits(limits.queue_s, limits.queue_images)
    engine = Engine(load_and_warm_up, max_batch_size, note_step, batch_limit_for, note, queue, watchdog)
    engine.assume_step(height, width, step_seconds[0])
    state.enter("ready")
    return engine


def _placement(parts: Parts) -> Placement:
    from stable_diffusion.engine.loading import device_name

    versions = {name: metadata.version(name) for name in ("torch", "diffusers", "transformers", "bentoml")}
    versions["python"] = platform.python_version()
    prediction_type = str(parts.scheduler.config.get("prediction_type", "epsilon"))
    return Placement(device_name(parts.device), str(parts.dtype).removeprefix("torch."), prediction_type, versions)


def _conditions(parts: Parts, model: ModelFolder, max_batch_size: int) -> Key:
    """On what measurements of steps depend."""
    import torch

    from stable_diffusion.engine.loading import device_name

    return {
        "device": device_name(parts.device),
        "dtype": str(parts.dtype),
        "torch": torch.__version__,
        "unet": hashlib.sha256(parts.unet.to_json_string().encode()).hexdigest(),
        "width": model.native_width,
        "height": model.native_height,
        "max_batch_size": max_batch_size,
    }


def _recall_or_measure_batch_limit(denoiser: Denoiser, model: ModelFolder, max_batch_size: int, key: Key) -> BatchLimit:
    """The batch limit of the way in use, which `key` names."""
    from stable_diffusion.engine.calibration import choose_batch_limit

    if (batch_limit := recall(key)) is not None:
        return batch_limit
    width, height = model.native_width, model.native_height
    batch_limit = choose_batch_limit(lambda jobs: denoiser.step_seconds(jobs, width, height), max_batch_size)
    if max_batch_size > 1 and not batch_limit.limited_by_memory:
        keep(key, batch_limit)
    return batch_limit
