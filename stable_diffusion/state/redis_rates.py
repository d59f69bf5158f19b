"""The rate limit of many machines, counted in a Redis or Valkey by its clock. While that is away, each machine counts on its own."""

from __future__ import annotations

from stable_diffusion.core.errors import SharedStateUnavailable
from stable_diffusion.state.rates import BURST_S, RateLimit
from stable_diffusion.state.redis_scripts import COUNT_REQUEST
from stable_diffusion.state.shared_store import SharedStore

PREFIX = "stable_diffusion:rate:"


class RedisRateLimit:
    """Implements state.rates.RateLimit."""

    def __init__(self, store: SharedStore, requests_per_minute: int, on_this_machine: RateLimit) -> None:
        """`on_this_machine`: counts while the store is away."""
        self._store = store
        self._interval_s = 60 / requests_per_minute
        self._on_this_machine = on_this_machine

    def wait_s(self, caller: str) -> float:
        try:
            return float(self._store.run(COUNT_REQUEST, [f"{PREFIX}{caller}"], self._interval_s, BURST_S))
        except SharedStateUnavailable:
            return self._on_this_machine.wait_s(caller)
