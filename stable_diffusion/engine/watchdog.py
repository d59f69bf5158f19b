"""Ends the process when it cannot continue: a step hangs, or the device has failed permanently. BentoML then starts it again.

Independent of jobs: the connections of waiting clients break with the process.
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
        """A step that takes longer than this, and twenty times as long as expected, is considered stuck."""
        self._stuck_after_s = stuck_after_s

    @contextmanager
    def watching(self, expected_s: float) -> Iterator[None]:
        """End the process if the block takes too long, with all stack traces in the log."""
        with self.limiting(max(self._stuck_after_s, _TIMES_AS_LONG_AS_EXPECTED * expected_s)):
            yield

    @contextmanager
    def limiting(self, seconds: float) -> Iterator[None]:
        """End the process if the block takes longer than this, with all stack traces in the log.

        faulthandler's thread does not need the GIL, which a hanging call may hold.
        """
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def end_process(self) -> None:
        """End the process after a moment in which pending messages reach waiting clients."""
        time.sleep(_TIME_TO_DELIVER_S)
        os._exit(_EXIT_STATUS)
