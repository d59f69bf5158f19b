"""The rate limit of one machine, counted in an SQLite file for all of its API workers.

Does not know that there are other machines.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from stable_diffusion.state.rates import BURST_S
from stable_diffusion.state.sqlite import transaction

logger = logging.getLogger("stable_diffusion")

_BUSY_TIMEOUT_S = 2
_SCHEMA = "CREATE TABLE IF NOT EXISTS callers (caller TEXT PRIMARY KEY, paid_off_s REAL NOT NULL) WITHOUT ROWID"


class SqliteRateLimit:
    """Implements state.rates.RateLimit."""

    def __init__(self, folder: Callable[[], Path], requests_per_minute: int) -> None:
        """`folder` returns the file's folder and creates it."""
        self._folder = folder
        self._interval_s = 60 / requests_per_minute
        self._burst_s = BURST_S

    def wait_s(self, caller: str) -> float:
        """If the file cannot be used, every request is allowed, and the log says so."""
        # All processes of a machine share the monotonic clock, and nobody can set it.
        now = time.monotonic()
        try:
            file = self._folder() / "rates.sqlite"
            with transaction(file, _SCHEMA, last_table="callers", busy_timeout_s=_BUSY_TIMEOUT_S) as database:
                database.execute("BEGIN IMMEDIATE")
                return self._count(database, caller, now)
        except (OSError, sqlite3.Error) as error:
            logger.error("The rate limit is not enforced, because the requests cannot be counted: %s", error)
            return 0.0

    def _count(self, database: sqlite3.Connection, caller: str, now: float) -> float:
        database.execute("DELETE FROM callers WHERE paid_off_s <= ?", (now,))
        row = database.execute("SELECT paid_off_s FROM callers WHERE caller = ?", (caller,)).fetchone()
        paid_off_s = (now if row is None else float(row[0])) + self._interval_s
        wait_s = paid_off_s - now - self._burst_s
        if wait_s > 1e-6:  # more than the rounding error of sums of fractions
            return wait_s
        database.execute("INSERT OR REPLACE INTO callers VALUES (?, ?)", (caller, paid_off_s))
        return 0.0
