"""What holds for every rate limit: how many are let in at once, when the next one is, and that each caller has a limit of its own.

The same tests run on the file of one machine and on a real Redis or Valkey.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from stable_diffusion.core.settings import read_settings
from stable_diffusion.state.rates import RateLimit
from stable_diffusion.state.sqlite_rates import SqliteRateLimit
from tests.redis_server import let_pass, needs_redis_server, started

PRECISION_S = 0.2  # of the store's clock, which goes on


@dataclass(frozen=True)
class Counter:
    limit: Callable[[int], RateLimit]
    let_pass: Callable[[float], None]  # so many seconds


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=needs_redis_server)])
def counter(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    if request.param == "sqlite":
        now = 1000.0

        def wait(seconds: float) -> None:
            nonlocal now
            now += seconds

        monkeypatch.setattr("stable_diffusion.state.sqlite_rates.time.monotonic", lambda: now)
        yield Counter(lambda per_minute: SqliteRateLimit(lambda: tmp_path, per_minute), wait)
        return
    from stable_diffusion.state.redis_rates import RedisRateLimit
    from stable_diffusion.state.shared_store import SharedStore

    with started(tmp_path) as server:
        address = read_settings({"SD_SHARED_STATE": server.url}).shared_state
        assert address is not None
        store = SharedStore(address)

        def limit(per_minute: int) -> RateLimit:
            return RedisRateLimit(store, per_minute, SqliteRateLimit(lambda: tmp_path, per_minute))

        yield Counter(limit, lambda seconds: let_pass(server, seconds))
        store.close()


def test_as_many_as_are_allowed_in_a_minute_come_at_once_and_then_one_each_share_of_it(counter: Counter) -> None:
    limit = counter.limit(6)
    assert [limit.wait_s("alice") for _ in range(6)] == [0.0] * 6
    assert limit.wait_s("alice") == pytest.approx(10, abs=PRECISION_S)
    counter.let_pass(9.5)
    assert limit.wait_s("alice") == pytest.approx(0.5, abs=PRECISION_S)
    counter.let_pass(0.5)
    assert limit.wait_s("alice") == 0.0
    assert limit.wait_s("alice") == pytest.approx(10, abs=PRECISION_S)


def test_whoever_waits_as_long_as_told_is_let_in_and_refused_requests_do_not_count(counter: Counter) -> None:
    limit = counter.limit(7)
    for _ in range(50):
        if wait_s := limit.wait_s("alice"):
            assert [limit.wait_s("alice") for _ in range(3)] == [pytest.approx(wait_s, abs=PRECISION_S)] * 3
            counter.let_pass(wait_s)
            assert limit.wait_s("alice") == 0.0


@pytest.mark.parametrize("per_minute", [7, 30, 100, 999])
def test_sums_of_fractions_let_no_more_and_no_fewer_in(counter: Counter, per_minute: int) -> None:
    limit = counter.limit(per_minute)
    began_s = time.monotonic()
    let_in = sum(limit.wait_s("alice") == 0.0 for _ in range(per_minute + 5))
    came_back = (time.monotonic() - began_s) * per_minute / 60
    assert per_minute <= let_in <= per_minute + came_back


def test_one_caller_takes_nothing_from_another(counter: Counter) -> None:
    limit = counter.limit(1)
    assert [limit.wait_s(name) for name in ("alice", "bob")] == [0.0, 0.0]
    assert limit.wait_s("alice") == pytest.approx(60, abs=PRECISION_S)
    assert limit.wait_s("bob") == pytest.approx(60, abs=PRECISION_S)
