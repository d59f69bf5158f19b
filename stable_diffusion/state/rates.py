"""The rate limit as the front door sees it: how many generation requests per minute each caller may send.

It is the generic cell rate algorithm: one number per caller, the time at which all of its requests are paid off. Does not know where that
number is kept: sqlite_rates.py for one machine, redis_rates.py for many.
"""

from __future__ import annotations

from typing import Protocol

BURST_S = 60.0  # so much may be unpaid: a minute's requests at once


class RateLimit(Protocol):
    """Allows a minute's requests at once. Each becomes available again after its share of a minute."""

    def wait_s(self, caller: str) -> float:
        """Count a request. Returns 0 if it is allowed. Otherwise it is not counted, and the result is the seconds until one would be.

        May wait for a disk or a network: do not call it on an event loop.
        """
