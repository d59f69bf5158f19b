"""What BentoML 1.4.19 has to be told, and what it knows of the server that is about to start. The only module that uses its internals."""

from __future__ import annotations

import os
import warnings
from typing import Any

import click
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.context import server_context
from bentoml._internal.utils import BentoMLDeprecationWarning

# Services with runners are "legacy" to BentoML 1.4 and on purpose here: docs/architecture.md says why.
warnings.filterwarnings("ignore", category=BentoMLDeprecationWarning)


def restart_workers_in_containers() -> None:
    """In a container BentoML starts no worker again that has died, which would leave a server that answers nothing for ever."""
    os.environ.pop("BENTOML_CONTAINERIZED", None)


def switch_off_request_timers() -> None:
    """BentoML's timer goes on for an hour after each answer and keeps 2.5 kB of it: gigabytes, if somebody only asks for /livez."""
    BentoMLContainer.api_server_config.traffic.timeout.set(0)
    if server_context.service_type == "runner":  # whose timer does the same; API workers wait for it as long as its setting says
        BentoMLContainer.runners_config.traffic.timeout.set(0)


def host() -> str:
    """Where `bentoml serve` is about to listen."""
    command = click.get_current_context(silent=True)
    given = command.params if command is not None else {}
    if chosen := given.get("host"):
        return str(chosen)
    return "127.0.0.1" if given.get("development") else str(BentoMLContainer.http.host.get())


def cors_options() -> dict[str, Any] | None:
    """From which sites pages may send requests, as BentoML's configuration says; None: from none."""
    if not BentoMLContainer.http.cors.enabled.get():
        return None
    options: dict[str, Any] = BentoMLContainer.access_control_options.get()
    return options
