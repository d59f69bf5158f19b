"""The records that the engine emits about its work, for metrics: plain values, passed to a callback on the engine's thread.

They do not depend on metrics or torch. Times are those of `time.perf_counter`; taking them never waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stable_diffusion.core.types import Kind

# "flagged": the image was generated too, but the safety checker blanked it.
Outcome = Literal["completed", "flagged", "failed", "out_of_memory", "deadline_exceeded", "cancelled"]
Refusal = Literal["queue_full", "deadline_exceeded"]


@dataclass(frozen=True)
class StepRecord:
    """One UNet call: the numbers of the jobs that shared it, its rows, how many of them have LoRAs, and the way of computing."""

    job_numbers: tuple[int, ...]
    rows: int
    rows_with_loras: int = 0
    execution: str = "eager"  # as SD_EXECUTION names it


@dataclass(frozen=True)
class TurnRecord:
    """One turn of the loop with a step: preparing new jobs, the UNet call, the noise schedulers, decoding at most one image.

    A GPU computes while the next steps are launched, so a single turn says little there; use the mean of many.
    """

    seconds: float


@dataclass(frozen=True)
class SubmitRecord:
    """A job now waits for its first step. Emitted on the submitting thread."""


@dataclass(frozen=True)
class RefusalRecord:
    """A job was refused. Emitted on the submitting thread."""

    reason: Refusal


@dataclass(frozen=True)
class WorkloadRecord:
    """The remaining work, in estimated seconds of the device, and its speed: pixels times steps per second, 0 if unknown."""

    seconds: float
    pixel_steps_per_s: float = 0.0


@dataclass(frozen=True)
class StartRecord:
    """A job takes its first step."""

    waited_s: float  # since it was submitted
    chunks: int = 1  # of 75 tokens, of its longest text


@dataclass(frozen=True)
class EndRecord:
    """A job has ended. `generation_s`: since its first step, including decoding; None if it ended before that."""

    kind: Kind
    outcome: Outcome
    generation_s: float | None


@dataclass(frozen=True)
class LorasRecord:
    """How many LoRAs are on the device, and their bytes, after a change."""

    count: int
    size_bytes: int


@dataclass(frozen=True)
class DecodedAgainRecord:
    """An image came out black or not finite, and was decoded again in float32."""


@dataclass(frozen=True)
class OutOfMemoryRecord:
    """A call did not fit into the device's memory, whether it was then split or made a job fail."""


@dataclass(frozen=True)
class BatchLimitRecord:
    """From now on at most `jobs` jobs of this size share a step, because `tried` did not fit into memory. Sizes in pixels."""

    width: int
    height: int
    jobs: int
    tried: int


Record = (
    TurnRecord
    | SubmitRecord
    | RefusalRecord
    | WorkloadRecord
    | StartRecord
    | EndRecord
    | LorasRecord
    | DecodedAgainRecord
    | OutOfMemoryRecord
    | BatchLimitRecord
)
