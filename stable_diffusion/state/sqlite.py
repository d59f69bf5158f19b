"""Opens the SQLite files that a server's processes share. Their content does not outlive the server.

Does not know their tables.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

_RETRY_S = 0.005


@contextmanager
def transaction(file: Path, schema: str, *, last_table: str, busy_timeout_s: float) -> Iterator[sqlite3.Connection]:
    """Open `file` for one transaction, which is rolled back on an exception. Rows have names.

    Creates the tables of `schema` if `last_table` is missing. A caller that reads before it writes must first execute BEGIN IMMEDIATE, so
    that no other process changes what it has read. Raises sqlite3.Error, also if another process locks the file for longer than
    `busy_timeout_s`.
    """
    with closing(sqlite3.connect(file, timeout=busy_timeout_s)) as database:
        database.row_factory = sqlite3.Row
        database.execute("PRAGMA synchronous = OFF")  # nothing here needs to survive a power cut
        _create(database, schema, last_table, busy_timeout_s)
        with database:
            yield database


def _create(database: sqlite3.Connection, schema: str, last_table: str, busy_timeout_s: float) -> None:
    """Create the tables unless another process has."""
    end_s = time.monotonic() + busy_timeout_s
    while True:
        try:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (last_table,)).fetchone():
                database.execute("PRAGMA journal_mode = WAL")
                database.executescript(schema)
            return
        except sqlite3.OperationalError as error:
            # Of processes that switch to WAL at once, SQLite lets all but one fail without waiting: they could wait for each other.
            if "locked" not in str(error) or time.monotonic() > end_s:
                raise
            time.sleep(_RETRY_S)
