"""Sets up at start in which way UNet calls are computed: the one that the operator names, a kept choice, or one found by trying.

The functions import the engine, as in `startup.py`. `engine/choosing.py` has the rule; here are the denoiser and what is kept.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from stable_diffusion.core.settings import EXECUTION_VARIABLE
from stable_diffusion.runner.measurement_cache import Key, has_ended_a_process, keep_way, recall_way, trying
from stable_diffusion.state.runner_status import Execution

if TYPE_CHECKING:
    import torch

    from stable_diffusion.engine.calibration import BatchLimit
    from stable_diffusion.engine.choosing import Trial
    from stable_diffusion.engine.denoiser import Denoiser
    from stable_diffusion.engine.row_inputs import RowInputs
    from stable_diffusion.engine.watchdog import Watchdog
    from stable_diffusion.engine.ways import Way

logger = logging.getLogger("stable_diffusion")

# For trying all ways. On a CPU only one is tried, and it differs already at its first call.
BUDGET_S = {"cuda": 120.0, "cpu": 1.0}
_COMPILING_S = 50.0
# The call that is running when the budget ends, and setting up a way, must end within this.
_GRACE_S = 120.0

ResultT = TypeVar("ResultT")


def set_up_execution(
    denoiser: Denoiser,
    device: str,
    dtype: str,
    size: tuple[int, int],
    max_batch_size: int,
    setting: str,
    key: Key,
    batch_limit_in: Callable[[str], BatchLimit],
    step_s: float,
    watchdog: Watchdog | None,
) -> tuple[Execution, BatchLimit]:
    """Set up the way of computing. Returns it and its batch limit.

    `device`: "cpu" or "cuda". `dtype`: like "torch.float16". `size`: the model's native width and height. `setting`: the value of
    SD_EXECUTION. `key`: the conditions of measurements. `batch_limit_in` recalls or measures the batch limit of the way in use, by its
    name. `step_s`: seconds of an eager step. `watchdog` ends the process if a try hangs; the next start leaves that way out.
    """
    from stable_diffusion.engine.ways import EAGER, way_named

    batch_limit = None
    if setting != "auto":
        name, reason = setting, f"{EXECUTION_VARIABLE} is {setting}"
    elif (kept := recall_way(key)) is not None:
        name, reason = kept
    else:
        batch_limit = batch_limit_in(EAGER.name)
        name, reason = _try(denoiser, device, dtype, size, sorted({1, batch_limit.jobs}), key, step_s, watchdog)
    way, problem = _used(denoiser, device, way_named(name), size, max_batch_size)
    execution = Execution(way.name, problem or reason)
    logger.log(logging.WARNING if problem else logging.INFO, "Steps are computed in this way: %s (%s).", way.name, execution.reason)
    if batch_limit is None or not way.is_eager:
        batch_limit = batch_limit_in(way.name)
    return execution, batch_limit


def _used(denoiser: Denoiser, device: str, way: Way, size: tuple[int, int], max_batch_size: int) -> tuple[Way, str]:
    """Set the way up for all numbers of jobs. Returns the way in use, which is eager if it cannot be set up, and then why."""
    import torch

    from stable_diffusion.engine.ways import EAGER, obstacle

    if way.is_eager:
        return EAGER, ""
    if problem := obstacle(way, device):
        return EAGER, f"not {way.name}: {problem}"
    try:
        rows = denoiser.use(way, *size, range(1, max_batch_size + 1))
    except torch.AcceleratorError:
        raise
    except Exception as error:
        logger.warning("The way of computing %s could not be set up.", way.name, exc_info=error)
        return EAGER, f"not {way.name}, which could not be set up: {type(error).__name__}"
    if way.graphs:
        logger.info("Steps of up to %d rows of %dx%d are recorded as CUDA graphs.", rows, *size)
    return way, ""


def _try(
    denoiser: Denoiser, device: str, dtype: str, size: tuple[int, int], jobs: list[int], key: Key, step_s: float, watchdog: Watchdog | None
) -> tuple[str, str]:
    """Try the ways of this device with each number of `jobs`. Returns the name of the chosen one, and why; both are kept."""
    import torch

    from stable_diffusion.engine.choosing import choose
    from stable_diffusion.engine.ways import EAGER, tolerance, ways_to_try

    budget_s = BUDGET_S[device]
    # The results to compare with, one way's, and the timed ones.
    if step_s * sum(jobs) * 2 > budget_s:
        return EAGER.name, f"a step takes {step_s:.1f} s: there is no time to try other ways"
    inputs = {count: denoiser.sample_inputs(count, *size) for count in jobs}
    others: list[Trial[torch.Tensor]] = []
    ended: list[str] = []
    for way in ways_to_try(device):
        if has_ended_a_process(key, way.name):
            ended.append(way.name)
            logger.warning("The way of computing %s is not tried: a process ended while it tried it.", way.name)
        else:
            others.append(_trial(denoiser, way, size, inputs, key, watchdog))
    choice = choose(
        _trial(denoiser, EAGER, size, inputs, key, None),
        others,
        jobs,
        _difference,
        tolerance(device, dtype),
        budget_s,
        time.perf_counter,
        fatal=(torch.AcceleratorError,),
    )
    for name, reason in choice.left.items():
        logger.info("The way of computing %s is left: %s.", name, reason)
    reason = "; ".join([choice.reason, *(f"{name}: a process ended while it tried it" for name in ended)])
    if not choice.limited_by_memory:
        keep_way(key, choice.name, reason)
    return choice.name, reason


def _trial(
    denoiser: Denoiser, way: Way, size: tuple[int, int], inputs: dict[int, RowInputs], key: Key, watchdog: Watchdog | None
) -> Trial[torch.Tensor]:
    from stable_diffusion.engine.choosing import Trial

    marks = ExitStack()

    def enter() -> None:
        marks.enter_context(trying(key, way.name))
        if watchdog is not None:
            marks.enter_context(watchdog.limiting(max(BUDGET_S.values()) + _GRACE_S))
        if _fitting(partial(denoiser.use, way, *size, list(inputs))) < 2 * max(inputs):
            raise MemoryError

    def leave() -> None:
        denoiser.call_unet.reset()
        marks.close()

    def compute(jobs: int) -> torch.Tensor:
        return _fitting(partial(denoiser.compute, inputs[jobs]))

    return Trial(way.name, enter, compute, leave, _COMPILING_S if way.compiled else 0.0)


def _fitting(work: Callable[[], ResultT]) -> ResultT:
    """The result. Raises MemoryError if the device's memory runs out."""
    import torch

    try:
        return work()
    except torch.OutOfMemoryError:
        pass
    # Outside the handler: the error's traceback holds the call's intermediate tensors.
    raise MemoryError


def _difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, divided by the norm of what is expected."""
    return float((result.float() - expected.float()).norm() / expected.float().norm())
