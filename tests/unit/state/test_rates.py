"""The rate limit: how many are let in at once, when the next one is, and that processes count together."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from stable_diffusion.state.rates import RateLimit


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("stable_diffusion.state.rates.time.monotonic", clock.monotonic)
    return clock


def test_as_many_as_are_allowed_in_a_minute_come_at_once_and_then_one_each_share_of_it(clock: Clock, tmp_path: Path) -> None:
    limit = RateLimit(lambda: tmp_path, 6)
    assert [limit.wait_s("alice") for _ in range(6)] == [0.0] * 6
    assert limit.wait_s("alice") == pytest.approx(10)
    clock.now += 9.5
    assert limit.wait_s("alice") == pytest.approx(0.5)
    clock.now += 0.5
    assert limit.wait_s("alice") == 0.0
    assert limit.wait_s("alice") == pytest.approx(10)


def test_whoever_waits_as_long_as_told_is_let_in_and_refused_requests_do_not_count(clock: Clock, tmp_path: Path) -> None:
    limit = RateLimit(lambda: tmp_path, 7)
    for _ in range(50):
        if wait_s := limit.wait_s("alice"):
            assert [limit.wait_s("alice") for _ in range(3)] == [pytest.approx(wait_s)] * 3
            clock.now += wait_s
            assert limit.wait_s("alice") == 0.0


def test_one_caller_takes_nothing_from_another(clock: Clock, tmp_path: Path) -> None:
    limit = RateLimit(lambda: tmp_path, 1)
    assert [limit.wait_s(name) for name in ("alice", "bob")] == [0.0, 0.0]
    assert limit.wait_s("alice") == limit.wait_s("bob") == pytest.approx(60)


def test_who_asked_for_nothing_for_a_minute_is_forgotten(clock: Clock, tmp_path: Path) -> None:
    limit = RateLimit(lambda: tmp_path, 2)
    for index in range(100):
        limit.wait_s(f"address {index}")
    size = (tmp_path / "rates.sqlite").stat().st_size
    for round_ in range(5):
        clock.now += 61
        for index in range(100):
            limit.wait_s(f"address {index} {round_}")
    assert (tmp_path / "rates.sqlite").stat().st_size <= 2 * max(size, 8192)


def let_in(folder: Path, tries: int) -> int:
    limit = RateLimit(lambda: folder, 20)
    return sum(limit.wait_s("alice") == 0.0 for _ in range(tries))


def test_processes_count_together(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.starmap(let_in, [(tmp_path / "warm", 1)] * 3)  # starting them is not part of it
        began_s = time.monotonic()
        counts = pool.starmap(let_in, [(tmp_path, 40)] * 3)
        took_s = time.monotonic() - began_s
    assert 20 <= sum(counts) <= 20 + 1 + took_s / 3, "one comes back every three seconds"


def test_where_nothing_can_be_counted_everybody_is_let_in_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    limit = RateLimit(lambda: tmp_path / "missing", 1)
    assert [limit.wait_s("alice") for _ in range(3)] == [0.0] * 3
    assert "rate limit is not enforced" in caplog.text
