"""The connection to the Redis or Valkey that several machines share: it runs scripts there and knows whether the store is away.

No call takes longer than about four seconds. Once one has found the store away, the others fail at once until a thread of its own finds it
back. Does not know what the scripts do. Imported only where SD_SHARED_STATE is set.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from stable_diffusion.core.errors import SettingError, SharedStateUnavailable
from stable_diffusion.core.settings import SHARED_STATE_VARIABLE, StoreAddress

logger = logging.getLogger("stable_diffusion")

# Each of connecting, the password and the call itself may take this long.
_TIMEOUT_S = 1.0
_TRY_AGAIN_S = 1.0
_LOG_AGAIN_S = 60.0
_CONNECTIONS = 128  # more than an API worker or a model process has threads


class SharedStore:
    """Threads may use it concurrently."""

    def __init__(self, address: StoreAddress) -> None:
        """Does not connect yet."""
        self._client = _client(address)
        self._scripts: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._away_since_s: float | None = None
        self._away_because = ""
        self._closed = threading.Event()
        self._logged: dict[str, float] = {}

    def run(self, script: str, keys: list[str], *arguments: str | bytes | int | float) -> Any:
        """Run a Lua script, whose effects other callers see all at once. Raises SharedStateUnavailable."""
        if script not in self._scripts:
            self._scripts[script] = self._client.register_script(script)
        return self._call(lambda: self._scripts[script](keys=keys, args=arguments))

    def is_reachable(self) -> bool:
        """Asks the store, unless it is known to be away."""
        try:
            self._call(self._client.ping)
        except SharedStateUnavailable:
            return False
        return True

    def close(self) -> None:
        self._closed.set()
        self._client.close()

    def _call(self, call: Callable[[], Any]) -> Any:
        with self._lock:
            if self._away_since_s is not None:
                raise _unavailable(self._away_because)
        try:
            return call()
        except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
            self._note_away(_reason(error))
            raise _unavailable(self._away_because) from None
        except redis.RedisError as error:
            if isinstance(error, redis.ReadOnlyError):
                # Its replica has taken over, and the store's name leads there for new connections.
                self._client.connection_pool.disconnect(inuse_connections=False)
            reason = _reason(error)
            self._log_refusal(reason)
            raise _unavailable(reason) from None

    def _note_away(self, reason: str) -> None:
        with self._lock:
            if self._away_since_s is not None:
                return
            self._away_since_s, self._away_because = time.monotonic(), reason
        logger.error("The shared state is away: it %s. Images can still be generated synchronously.", reason)
        threading.Thread(target=self._wait_until_back, daemon=True, name="shared state").start()

    def _wait_until_back(self) -> None:
        while not self._closed.wait(_TRY_AGAIN_S):
            try:
                self._client.ping()
            except (redis.RedisError, OSError) as error:
                self._away_because = _reason(error)
                continue
            with self._lock:
                away_s, self._away_since_s = time.monotonic() - (self._away_since_s or 0.0), None
            logger.info("The shared state is back after %.0f s.", away_s)
            return

    def _log_refusal(self, reason: str) -> None:
        with self._lock:
            if time.monotonic() < self._logged.get(reason, 0.0):
                return
            self._logged = {reason: time.monotonic() + _LOG_AGAIN_S}
        logger.error("The shared state refuses a call: it %s.", reason)


def _client(address: StoreAddress) -> Any:
    encryption = {"ssl": True, "ssl_min_version": ssl.TLSVersion.TLSv1_2} if address.is_encrypted else {}
    return redis.Redis(
        host=address.host,
        port=address.port,
        db=address.database,
        username=address.user,
        password=address.password,
        socket_timeout=_TIMEOUT_S,
        socket_connect_timeout=_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),  # a script that timed out may have run
        max_connections=_CONNECTIONS,
        protocol=2,  # with 3, and with the name of the library, each new connection asks more questions
        driver_info=None,
        **encryption,
    )


def _unavailable(reason: str) -> SharedStateUnavailable:
    return SharedStateUnavailable(f"the shared state of the machines {reason}; images can still be generated synchronously")


def _reason(error: Exception) -> str:
    """Why a call failed, as the rest of a sentence that begins with the store. Contains nothing of the URL."""
    text = str(error)
    match error:
        case redis.OutOfMemoryError():
            return "is full"
        case redis.AuthenticationError():
            return "does not accept the user or the password"
        case redis.BusyLoadingError():
            return "is loading its data"
        case redis.InvalidResponse():
            return "does not speak the protocol of Redis"
        case redis.ReadOnlyError():
            return "is a replica, which takes no changes"
        case redis.TimeoutError():
            return "does not answer"
        case redis.ConnectionError() | OSError() if "SSL" in text or "certificate" in text:
            return "has no TLS certificate that this machine trusts"
        case redis.ConnectionError() | OSError():
            return "cannot be reached"
        case _ if text.startswith("NOPERM") or isinstance(error, redis.exceptions.NoPermissionError):
            return "does not allow this user a command"
        case _:
            return f"answers with an error: {text[:200]}"


def check_store(address: StoreAddress) -> None:
    """Raises SettingError with the reason if the store cannot be used: it is away, refuses the password, or is no such store."""
    client = _client(address)
    try:
        client.ping()
        memory = client.info("memory")
    except (redis.RedisError, OSError, ValueError) as error:
        raise SettingError(f"{SHARED_STATE_VARIABLE}: the store at {address} {_reason(error)}") from None
    finally:
        client.close()
    policy = str(memory.get("maxmemory_policy", ""))
    if policy.startswith("allkeys"):
        logger.warning("The shared state may delete unfinished jobs when it is full: set its maxmemory-policy to noeviction.")
