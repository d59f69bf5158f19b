"""How many finished images are decoded in one call, from the times of such calls. Pure arithmetic: no torch, no clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping

_COUNTS = (1, 2, 4)
# Decoding more together must take this much less time for each image: all of them wait for the last.
_LEAST_GAIN = 1.05
# A device that takes this long for one image is full with it, and measuring more would only delay the start.
_FULL_WITH_ONE_S = 1.0


def useful_counts(seconds: Callable[[int], float | None]) -> dict[int, float]:
    """The numbers of images that are worth decoding together, with the seconds of the call.

    `seconds(count)` measures a call; None: it does not fit into memory, or its images are not those of single calls.
    """
    useful: dict[int, float] = {}
    for count in _COUNTS:
        spent = seconds(count)
        if spent is None or (useful and count * min(useful[one] / one for one in useful) < _LEAST_GAIN * spent):
            break
        useful[count] = spent
        if spent > _FULL_WITH_ONE_S:
            break
    return useful


def count_to_decode(useful: Mapping[int, float], waiting: int, times_pixels: float, most_s: float | None) -> int:
    """How many of `waiting` images of one size to decode now, at least one.

    `times_pixels`: their pixels divided by those of the measured size. `most_s`: no more than one if decoding takes longer than this, the
    time of a step of other jobs; None if none wait.
    """
    fitting = [count for count, spent in useful.items() if count <= waiting and (most_s is None or spent * times_pixels <= most_s)]
    # Larger images take more memory than what was measured.
    return max(fitting, default=1) if times_pixels <= 1 else 1
