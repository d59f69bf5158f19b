"""Says once in the log that the server is ready, at which address, with which model and batch limit.

A thread of the first process asks for /readyz as a load balancer does. Does not depend on BentoML.
"""

from __future__ import annotations

import http.client
import logging
import threading
import time
from contextlib import closing

from stable_diffusion.state.runner_status import living_runners

logger = logging.getLogger("stable_diffusion")

_ASK_INTERVAL_S = 0.5
_TIMEOUT_S = 30.0  # until an API worker runs, connections wait
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # of addresses that stand for all of a machine


def say_when_ready(host: str, port: int, model_name: str) -> None:
    """Returns at once. `host`: the IP address at which the server listens."""
    threading.Thread(target=_wait_and_say, args=(host, port, model_name), daemon=True, name="ready line").start()


def _wait_and_say(host: str, port: int, model_name: str) -> None:
    while not _is_ready(_LOOPBACK.get(host, host), port):
        time.sleep(_ASK_INTERVAL_S)
    limits = [runner.batch_limits[0] for runner in living_runners() if runner.stage == "ready" and runner.batch_limits]
    batch_limit = f", batch limit {limits[0].images} at {limits[0].width}x{limits[0].height}" if limits else ""
    logger.info("Ready: http://%s:%d, model %s%s.", f"[{host}]" if ":" in host else host, port, model_name, batch_limit)


def _is_ready(host: str, port: int) -> bool:
    try:
        with closing(http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)) as connection:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
