"""Each caller's share of a limited resource, in two rules: one for work that waits, one for memory that is held.

Pure arithmetic: what is counted, and in which unit, is the caller's choice.
"""

from __future__ import annotations

ABOVE_THE_LIMIT = 2  # shares of many owners may add up to this multiple of a limit on waiting work


def share_is_left(own: float, total: float, owners: int, limit: float) -> bool:
    """Whether an owner may add work although the `total` has reached `limit`: its share of the limit is not used up.

    `own`: what the owner has waiting, of `total`. `owners`: how many have something waiting, this one included.
    """
    return own < limit / owners and total < ABOVE_THE_LIMIT * limit


def half_of(limit: int) -> int:
    """The most that one caller may hold of `limit`, which the total never exceeds: nobody can shut out all others."""
    return limit // 2
