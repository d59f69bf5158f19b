"""Processes that create the same files at the same moment."""

from __future__ import annotations

import multiprocessing
from multiprocessing.synchronize import Barrier
from pathlib import Path

from stable_diffusion.state.sqlite import transaction

PROCESSES = 3
FILES = 50
SCHEMA = "CREATE TABLE IF NOT EXISTS rows (row)"


def create(folder: Path, together: Barrier) -> None:
    for number in range(FILES):
        together.wait(60)
        with transaction(folder / f"{number}.sqlite", SCHEMA, last_table="rows", busy_timeout_s=10) as database:
            database.execute("INSERT INTO rows VALUES (1)")


def test_processes_that_create_a_file_at_once_all_use_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(PROCESSES)
    processes = [context.Process(target=create, args=(tmp_path, together)) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    for number in range(FILES):
        with transaction(tmp_path / f"{number}.sqlite", "", last_table="rows", busy_timeout_s=1) as database:
            assert database.execute("SELECT count(*) FROM rows").fetchone()[0] == PROCESSES
