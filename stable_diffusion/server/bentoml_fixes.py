"""Adjusts BentoML 1.4.19 and reads its settings for the server that is about to start.

This is the only module that uses BentoML's internals.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import click
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.context import server_context
from bentoml._internal.utils import BentoMLDeprecationWarning

from stable_diffusion.core.settings import OPERATORS_THREADS_VARIABLE, operators_threads

# BentoML 1.4 calls services with runners "legacy". They are intended here; docs/decisions.md says why.
warnings.filterwarnings("ignore", category=BentoMLDeprecationWarning)


def restart_workers_in_containers() -> None:
    """In a container BentoML does not restart a dead worker; without this the server would stay up and never respond."""
    os.environ.pop("BENTOML_CONTAINERIZED", None)


def keep_operators_threads() -> None:
    """Keep the operator's thread settings: BentoML overwrites OMP_NUM_THREADS and similar variables in the model process."""
    os.environ.setdefault(OPERATORS_THREADS_VARIABLE, operators_threads(os.environ))


def switch_off_request_timers() -> None:
    """BentoML's timer runs for an hour after each response and holds 2.5 kB: gigabytes, if a client keeps requesting /livez."""
    BentoMLContainer.api_server_config.traffic.timeout.set(0)
    if server_context.service_type == "runner":  # has the same timer; in API workers this setting limits the wait for the runner
        BentoMLContainer.runners_config.traffic.timeout.set(0)


def host() -> str:
    """The address at which `bentoml serve` is about to listen."""
    given = _options()
    if chosen := given.get("host"):
        return str(chosen)
    return "127.0.0.1" if given.get("development") else str(BentoMLContainer.http.host.get())


def port() -> int:
    """The TCP port at which `bentoml serve` is about to listen."""
    return int(_options().get("port") or BentoMLContainer.http.port.get())


def is_encrypted() -> bool:
    """Whether `bentoml serve` is about to speak TLS."""
    return bool(_options().get("ssl_certfile") or BentoMLContainer.ssl.enabled.get())


def _options() -> dict[str, Any]:
    command = click.get_current_context(silent=True)
    return command.params if command is not None else {}


def cors_options() -> dict[str, Any] | None:
    """BentoML's CORS settings: the sites whose pages may send requests. None: no site."""
    if not BentoMLContainer.http.cors.enabled.get():
        return None
    options: dict[str, Any] = BentoMLContainer.access_control_options.get()
    return options
