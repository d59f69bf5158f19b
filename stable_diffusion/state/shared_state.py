"""Chooses where the state of jobs and the rate limit lie: with SD_SHARED_STATE in a store that machines share, else on this machine.

Without that variable nothing here imports the store's client.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from stable_diffusion.core.errors import SettingError
from stable_diffusion.core.settings import StoreAddress, read_settings
from stable_diffusion.state.folder import server_token, shared_folder
from stable_diffusion.state.jobs import JobQueue, Jobs
from stable_diffusion.state.rates import RateLimit
from stable_diffusion.state.sqlite_jobs import SqliteJobs
from stable_diffusion.state.sqlite_rates import SqliteRateLimit


@dataclass(frozen=True)
class State:
    """`rate_limit` takes requests per minute.

    `queue`: from which machines take accepted jobs. `is_reachable` asks the store that they share. Both are None if nothing is shared.
    """

    jobs: Jobs
    rate_limit: Callable[[int], RateLimit]
    queue: JobQueue | None = None
    is_reachable: Callable[[], bool] | None = None


def open_state(environment: Mapping[str, str]) -> State:
    """The state of this server. Opens no connection yet. Settings that are invalid count as unset: `check_shared_state` reports them."""
    address = shared_address(environment)
    if address is None:
        return State(SqliteJobs(shared_folder), local_rate_limit)
    from stable_diffusion.state.redis_jobs import RedisJobs
    from stable_diffusion.state.redis_rates import RedisRateLimit
    from stable_diffusion.state.shared_store import SharedStore

    store = SharedStore(address)

    def rate_limit(requests_per_minute: int) -> RateLimit:
        return RedisRateLimit(store, requests_per_minute, local_rate_limit(requests_per_minute))

    jobs = RedisJobs(store, server_token())
    return State(jobs, rate_limit, jobs, store.is_reachable)


def local_rate_limit(requests_per_minute: int) -> RateLimit:
    return SqliteRateLimit(shared_folder, requests_per_minute)


def shared_address(environment: Mapping[str, str]) -> StoreAddress | None:
    try:
        return read_settings(environment).shared_state
    except SettingError:
        return None


def is_shared() -> bool:
    """Whether other machines know this one's jobs."""
    return shared_address(os.environ) is not None


def check_shared_state(environment: Mapping[str, str]) -> None:
    """Raises SettingError if SD_SHARED_STATE is invalid or its store cannot be used."""
    address = read_settings(environment).shared_state
    if address is not None:
        from stable_diffusion.state.shared_store import check_store

        check_store(address)
