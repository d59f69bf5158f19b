"""What the operator has decided about who may come in: keys, what is open without one, how much each caller may ask for.

And whether the server may start like that at the address where it listens. Knows nothing of requests.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from stable_diffusion.core.errors import SettingError
from stable_diffusion.server.access.keys import FILE_VARIABLE, VARIABLE, Key, read_keys

logger = logging.getLogger("stable_diffusion")


OPENABLE = ("docs", "metrics")
_MAX_REQUESTS_PER_MINUTE = 100_000


@dataclass(frozen=True)
class Access:
    """Without `keys` everybody comes in. `open` are those of OPENABLE that need none; without a limit anything may be asked for."""

    keys: tuple[Key, ...] = ()
    open: frozenset[str] = frozenset()
    is_without_keys_on_purpose: bool = False
    requests_per_minute: int | None = None


def read_access(variables: Mapping[str, str]) -> Access:
    """From SD_API_KEYS, SD_API_KEYS_FILE, SD_OPEN, SD_WITHOUT_KEYS and SD_RATE_LIMIT. Raises SettingError."""
    return Access(read_keys(variables), _open(variables), _without_keys(variables), _requests_per_minute(variables))


def _open(variables: Mapping[str, str]) -> frozenset[str]:
    names = frozenset(name.strip() for name in variables.get("SD_OPEN", "").split(",") if name.strip())
    if unknown := sorted(names - set(OPENABLE)):
        raise SettingError(f"SD_OPEN: {unknown[0]!r} cannot be opened, only {' and '.join(OPENABLE)}")
    return names


def _without_keys(variables: Mapping[str, str]) -> bool:
    value = variables.get("SD_WITHOUT_KEYS", "")
    if value not in ("", "0", "1"):
        raise SettingError(f"SD_WITHOUT_KEYS: must be 1, 0 or empty, {value!r} is not")
    return value == "1"


def _requests_per_minute(variables: Mapping[str, str]) -> int | None:
    value = variables.get("SD_RATE_LIMIT", "").strip()
    if not value:
        return None
    if not (value.isascii() and value.isdigit() and 1 <= int(value[:7]) <= _MAX_REQUESTS_PER_MINUTE and len(value) <= 6):
        raise SettingError(f"SD_RATE_LIMIT: must be a whole number from 1 to {_MAX_REQUESTS_PER_MINUTE}, drawing requests a minute")
    return int(value)


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
            f"no API key is set, and everybody who reaches {host} could draw. Set {VARIABLE} or {FILE_VARIABLE} "
            "('python -m stable_diffusion.keys NAME' makes a key), or listen with --host 127.0.0.1. "
            "Where something else keeps others out (a firewall, a published port of 127.0.0.1 only), SD_WITHOUT_KEYS=1 starts without keys"
        )
    logger.warning(
        "NO API KEY IS SET, AND THE SERVER LISTENS ON %s: everybody who reaches this address can draw and see everything. "
        "Set %s or %s ('python -m stable_diffusion.keys NAME' makes a key), or listen with --host 127.0.0.1.",
        host,
        VARIABLE,
        FILE_VARIABLE,
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address. What is no address counts as one that others reach."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
