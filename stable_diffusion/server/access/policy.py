"""The operator's access policy: API keys, what is open without one, and the rate limit.

Also decides whether the server may start with this policy at its address.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from stable_diffusion.core.addresses import is_loopback
from stable_diffusion.core.errors import SettingError
from stable_diffusion.core.settings import KEYS_FILE_VARIABLE, KEYS_VARIABLE, WITHOUT_KEYS_VARIABLE, read_settings
from stable_diffusion.server.access.keys import Key, read_keys

logger = logging.getLogger("stable_diffusion")

PROBES = ("/livez", "/readyz", "/healthz")  # load balancers send no key
# A POST to one of these generates. Requests that query, cancel or set options are not counted.
LIMITED_PATHS = (
    *("/txt2img", "/img2img", "/inpaint", "/reproduce", "/v1/images/generations", "/v1/images/edits"),
    *("/sdapi/v1/txt2img", "/sdapi/v1/img2img"),
)


@dataclass(frozen=True)
class Access:
    """Without `keys` every request is allowed. `open`: the pages that need no key, docs or metrics."""

    keys: tuple[Key, ...] = ()
    open: frozenset[str] = frozenset()
    is_without_keys_on_purpose: bool = False
    requests_per_minute: int | None = None  # None: no rate limit


def read_access(variables: Mapping[str, str]) -> Access:
    """Read the policy from the settings and the API keys. Raises SettingError."""
    settings = read_settings(variables)
    return Access(read_keys(variables), settings.open, settings.without_keys, settings.requests_per_minute)


def check_exposure(access: Access, host: str, *, in_bento: bool) -> None:
    """Log who can use the server at the address `host`. Raises SettingError if a bento would be open to everyone by accident."""
    if access.keys:
        opened = f"; open without a key: {', '.join(sorted(access.open))}" if access.open else ""
        logger.info("Requests need an API key. Keys: %s%s", ", ".join(key.name for key in access.keys), opened)
        return
    if is_loopback(host):
        return
    if in_bento and not access.is_without_keys_on_purpose:
        raise SettingError(
            f"no API key is set, and everyone who reaches {host} could generate images. Set {KEYS_VARIABLE} or {KEYS_FILE_VARIABLE} "
            "('python -m stable_diffusion.keys NAME' makes a key), or listen with --host 127.0.0.1. "
            f"In an env file the line is {KEYS_VARIABLE}=alice:sha256:..., without quotes; Docker drops a line without {KEYS_VARIABLE}=. "
            f"If others cannot reach the server anyway (a firewall, a port published on 127.0.0.1 only), set {WITHOUT_KEYS_VARIABLE}=1 "
            "to start without keys"
        )
    logger.warning(
        "NO API KEY IS SET, AND THE SERVER LISTENS ON %s: everyone who reaches this address can generate images and see all pages. "
        "Set %s or %s ('python -m stable_diffusion.keys NAME' makes a key), or listen with --host 127.0.0.1.",
        host,
        KEYS_VARIABLE,
        KEYS_FILE_VARIABLE,
    )


def caller_at(address: str) -> str:
    """The caller behind an address. All addresses of an IPv6 /64, the smallest network that a customer gets, are one caller."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return f"address {address}"
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is None:
            return f"address {ipaddress.IPv6Network((int(parsed) >> 64 << 64, 64))}"
        parsed = parsed.ipv4_mapped
    return f"address {parsed}"
