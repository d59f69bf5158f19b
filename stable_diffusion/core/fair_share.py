"""Each caller's share of a limited resource: one rule for waiting work, one for held memory.

Pure arithmetic: the caller chooses what is counted and in which unit.
"""

from __future__ import annotations

ABOVE_THE_LIMIT = 2  # shares of many owners may add up to this multiple of a limit on waiting work


def share_is_left(owned: float, total: float, owners: int, limit: float) -> bool:
    """Whether an owner may add work although the `total` has reached `limit`: its share of the limit is not used up.

    `owned`: the owner's part of `total`. `owners`: how many have waiting work, including this one.
    """
    return owned < limit / owners and total < ABOVE_THE_LIMIT * limit


def half_of(limit: int) -> int:
    """The most that one caller may hold of `limit`, which the total never exceeds, so that no caller can shut out all others."""
    return limit // 2
