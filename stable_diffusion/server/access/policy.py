"""What the operator has decided about who may come in: keys, what is open without one, how much each caller may ask for.

And whether the server may start like that at the address where it listens. Knows nothing of requests.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from stable_diffusion.core.errors import SettingError
from stable_diffusion.core.settings import KEYS_FILE_VARIABLE, KEYS_VARIABLE, WITHOUT_KEYS_VARIABLE, read_settings
from stable_diffusion.server.access.keys import Key, read_keys

logger = logging.getLogger("stable_diffusion")


@dataclass(frozen=True)
class Access:
    """Without `keys` everybody comes in. `open` is what needs none, of docs and metrics; without a limit anything may be asked for."""

    keys: tuple[Key, ...] = ()
    open: frozenset[str] = frozenset()
    is_without_keys_on_purpose: bool = False
    requests_per_minute: int | None = None


def read_access(variables: Mapping[str, str]) -> Access:
    """What the settings and the API keys say of it. Raises SettingError."""
    settings = read_settings(variables)
    return Access(read_keys(variables), settings.open, settings.without_keys, settings.requests_per_minute)


def check_exposure(access: Access, host: str, *, in_bento: bool) -> None:
    """Say in the log who can come in at the address `host`. Raises SettingError where a bento would let in everybody by accident."""
    if access.keys:
        opened = f"; open without one: {', '.join(sorted(access.open))}" if access.open else ""
        logger.info("An API key is needed. There are keys of: %s%s", ", ".join(key.name for key in access.keys), opened)
        return
    if is_loopback(host):
        return
    if in_bento and not access.is_without_keys_on_purpose:
        raise SettingError(
            f"no API key is set, and everybody who reaches {host} could draw. Set {KEYS_VARIABLE} or {KEYS_FILE_VARIABLE} "
            "('python -m stable_diffusion.keys NAME' makes a key), or listen with --host 127.0.0.1. "
            "Where something else keeps others out (a firewall, a published port of 127.0.0.1 only), "
            f"{WITHOUT_KEYS_VARIABLE}=1 starts without keys"
        )
    logger.warning(
        "NO API KEY IS SET, AND THE SERVER LISTENS ON %s: everybody who reaches this address can draw and see everything. "
        "Set %s or %s ('python -m stable_diffusion.keys NAME' makes a key), or listen with --host 127.0.0.1.",
        host,
        KEYS_VARIABLE,
        KEYS_FILE_VARIABLE,
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address. What is no address counts as one that others reach."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
