"""A contender that dies while it loads. In a file of its own, because a spawned process imports the file of its function."""

from __future__ import annotations

from multiprocessing.connection import Connection

from benchmarks.setup import Setup


def die(connection: Connection, setup: Setup) -> None:
    raise SystemExit(3)
