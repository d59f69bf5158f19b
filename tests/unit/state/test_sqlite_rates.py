"""The rate limit of one machine: its file stays small, processes count together, and nobody is kept out if it cannot be written."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from stable_diffusion.state.sqlite_rates import SqliteRateLimit


def test_who_asked_for_nothing_for_a_minute_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("stable_diffusion.state.sqlite_rates.time.monotonic", lambda: now)
    limit = SqliteRateLimit(lambda: tmp_path, 2)
    for index in range(100):
        limit.wait_s(f"address {index}")
    size = (tmp_path / "rates.sqlite").stat().st_size
    for round_ in range(5):
        now += 61
        for index in range(100):
            limit.wait_s(f"address {index} {round_}")
    assert (tmp_path / "rates.sqlite").stat().st_size <= 2 * max(size, 8192)


def let_in(folder: Path, tries: int) -> int:
    limit = SqliteRateLimit(lambda: folder, 20)
    return sum(limit.wait_s("alice") == 0.0 for _ in range(tries))


def test_processes_count_together(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.starmap(let_in, [(tmp_path / "warm", 1)] * 3)  # starting them is not part of it
        began_s = time.monotonic()
        counts = pool.starmap(let_in, [(tmp_path, 40)] * 3)
        took_s = time.monotonic() - began_s
    assert 20 <= sum(counts) <= 20 + 1 + took_s / 3, "one comes back every three seconds"


def test_where_nothing_can_be_counted_everybody_is_let_in_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    limit = SqliteRateLimit(lambda: tmp_path / "missing", 1)
    assert [limit.wait_s("alice") for _ in range(3)] == [0.0] * 3
    assert "rate limit is not enforced" in caplog.text
