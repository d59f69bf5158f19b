"""Ends the process when it cannot go on: a step hangs, or the device has failed for good. Whoever started the process starts it again.

Knows nothing of jobs; the connections of those who wait break with the process.
"""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

_TIMES_AS_LONG_AS_EXPECTED = 20
_TIME_TO_DELIVER_S = 1.0
_EXIT_STATUS = 1


class Watchdog:
    def __init__(self, stuck_after_s: float) -> None:
        """What takes so long, and twenty times as long as expected, will not end any more."""
        self._stuck_after_s = stuck_after_s

    @contextmanager
    def watching(self, expected_s: float) -> Iterator[None]:
        """The log gets what every thread was doing. faulthandler's thread needs no GIL, which a call that hangs may hold."""
        faulthandler.dump_traceback_later(max(self._stuck_after_s, _TIMES_AS_LONG_AS_EXPECTED * expected_s), exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def end_process(self) -> None:
        """After a moment in which what has been said to those who wait reaches them."""
        time.sleep(_TIME_TO_DELIVER_S)
        os._exit(_EXIT_STATUS)
