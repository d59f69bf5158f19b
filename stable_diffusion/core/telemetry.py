"""What the engine tells of its work, for counting: plain values, given to whoever wants to know, on the engine's thread.

Knows nothing of who counts, nor of torch. Times are of `time.perf_counter`: nothing waits for the device to take them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stable_diffusion.core.types import Kind

# "flagged" was drawn too, but the safety checker has blanked it.
Outcome = Literal["completed", "flagged", "failed", "out_of_memory", "deadline_exceeded", "cancelled"]
Refusal = Literal["queue_full", "deadline_exceeded"]


@dataclass(frozen=True)
class StepRecord:
    """One UNet call: the numbers of the jobs that shared it, and how many rows it had."""

    job_numbers: tuple[int, ...]
    rows: int


@dataclass(frozen=True)
class TurnRecord:
    """One turn of the loop that took a step: preparing newcomers, the UNet call, the noise schedulers, decoding at most one picture.

    A GPU computes while the next steps are launched, so there a single turn says little and the mean of many is right.
    """

    seconds: float


@dataclass(frozen=True)
class SubmitRecord:
    """A job waits for its first step from now on. Told on the thread that submits."""


@dataclass(frozen=True)
class RefusalRecord:
    """A job was not taken on. Told on the thread that submits."""

    reason: Refusal


@dataclass(frozen=True)
class WorkloadRecord:
    """How much work is left, in estimated seconds of the device."""

    seconds: float


@dataclass(frozen=True)
class StartRecord:
    """A job takes its first step."""

    waited_s: float  # since it was submitted


@dataclass(frozen=True)
class EndRecord:
    """A job is over. `drawn_s`: since its first step, with decoding; None if it ended before that."""

    kind: Kind
    outcome: Outcome
    drawn_s: float | None


@dataclass(frozen=True)
class DecodedAgainRecord:
    """A picture came out black or as no numbers, and was decoded once more in float32."""


@dataclass(frozen=True)
class OutOfMemoryRecord:
    """The device had no room for a call, whether it could be split or took a job with it."""


@dataclass(frozen=True)
class BatchLimitRecord:
    """From now on at most `jobs` of this size share a step, because `tried` did not fit into memory. Sizes in pixels."""

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
    | DecodedAgainRecord
    | OutOfMemoryRecord
    | BatchLimitRecord
)
