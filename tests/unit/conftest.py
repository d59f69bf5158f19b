"""Fixtures of unit tests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stable_diffusion.core.settings import read_settings
from stable_diffusion.state.sqlite_jobs import SqliteJobs
from tests.job_stores import Store
from tests.redis_server import let_pass, needs_redis_server, started


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=needs_redis_server)])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The file of one machine, and a real Redis or Valkey."""
    if request.param == "sqlite":
        later_s = 0.0
        clock = time.time

        def wait(seconds: float) -> None:
            nonlocal later_s
            later_s += seconds

        monkeypatch.setattr(time, "time", lambda: clock() + later_s)
        yield Store(SqliteJobs(lambda: tmp_path), wait)
        return
    from stable_diffusion.state.redis_jobs import RedisJobs
    from stable_diffusion.state.shared_store import SharedStore

    with started(tmp_path) as server:
        address = read_settings({"SD_SHARED_STATE": server.url}).shared_state
        assert address is not None
        shared = SharedStore(address)
        jobs = RedisJobs(shared, "machine")
        yield Store(jobs, lambda seconds: let_pass(server, seconds), jobs)
        jobs.close()
        shared.close()
