"""API keys: parses the configured keys and finds the one that a request carries. `python -m stable_diffusion.keys NAME` makes one.

Memory holds names and SHA-256 digests, no keys.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import re
import secrets
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers

from stable_diffusion.core.errors import SettingError
from stable_diffusion.core.settings import KEYS_FILE_VARIABLE, KEYS_VARIABLE, is_in_quotes, unquoted

logger = logging.getLogger("stable_diffusion")

MIN_CHARACTERS = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SECRET = re.compile(r"[!-+\--9;-~]+")  # printable ASCII except space, comma and colon
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_DIGEST_PREFIX = "sha256:"


@dataclass(frozen=True)
class Key:
    name: str
    digest: bytes  # SHA-256 of the key

    def __str__(self) -> str:
        """The key as an entry of SD_API_KEYS."""
        return f"{self.name}:{_DIGEST_PREFIX}{self.digest.hex()}"


def read_keys(variables: Mapping[str, str]) -> tuple[Key, ...]:
    """The keys in SD_API_KEYS and in the file that SD_API_KEYS_FILE names; none if neither is set.

    Raises SettingError, which names the wrong entry, never its secret.
    """
    _refuse_entry_as_variable(variables)
    value, path = unquoted(variables, KEYS_VARIABLE), unquoted(variables, KEYS_FILE_VARIABLE)
    entries = [(f"{KEYS_VARIABLE}, entry {number}", entry) for number, entry in _filled(value.split(","))]
    if path:
        entries += [(f"{KEYS_FILE_VARIABLE}, line {number}", entry) for number, entry in _lines_of(path)]
    if not entries and (path or value):
        raise SettingError(f"{KEYS_FILE_VARIABLE if path else KEYS_VARIABLE} is set but contains no key")
    keys = tuple(_key(where, entry, number) for number, (where, entry) in enumerate(entries, 1))
    _refuse_duplicates(keys)
    return keys


def _refuse_entry_as_variable(variables: Mapping[str, str]) -> None:
    """Refuse a variable named `alice:KEY`: Docker creates one from the line `alice:KEY=` in an env file. No other name has a colon."""
    for variable in variables:
        name, colon, secret = variable.partition(":")
        if colon and len(secret) >= MIN_CHARACTERS and _NAME.fullmatch(name):
            raise SettingError(
                f"{KEYS_VARIABLE}: the environment has a variable whose name begins with '{name}:', like an entry of {KEYS_VARIABLE}. "
                f"In an env file the line must begin with {KEYS_VARIABLE}="
            )


def _filled(parts: Iterable[str]) -> list[tuple[int, str]]:
    return [(number, part.strip()) for number, part in enumerate(parts, 1) if part.strip()]


def _lines_of(path: str) -> list[tuple[int, str]]:
    file = Path(path)
    try:
        content = file.read_text(encoding="utf-8")
        mode = file.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingError(f"{KEYS_FILE_VARIABLE}: {file.absolute()} cannot be read: {reason}") from None
    if mode & 0o077:
        logger.warning("Other users may read or change %s, which holds API keys: run chmod 600 %s", path, path)
    return [(number, line) for number, line in _filled(content.splitlines()) if not line.startswith("#")]


def _key(where: str, entry: str, number: int) -> Key:
    """Parse `name:key`, `name:sha256:HEX`, or either without a name. No message contains a secret that looks like a name."""
    if entry.startswith(f"{KEYS_VARIABLE}="):
        raise SettingError(f"{where}: leave out '{KEYS_VARIABLE}=', which belongs only before the first entry of an env file's line")
    name, colon, secret = entry.partition(":")
    if is_in_quotes(entry) or is_in_quotes(secret):
        raise SettingError(f"{where}: must not be in quotes")
    if not colon or entry.lower().startswith(_DIGEST_PREFIX):
        name, secret = f"key{number}", entry
    elif not _NAME.fullmatch(name):
        raise SettingError(
            f"{where}: the name before the colon must be 1 to 64 letters, digits, '_', '-' and '.', starting with a letter or digit"
        )
    where = f"{where} ({name})"
    if secret.lower().startswith(_DIGEST_PREFIX):
        digest = secret[len(_DIGEST_PREFIX) :]
        if not _DIGEST.fullmatch(digest):
            raise SettingError(f"{where}: {_DIGEST_PREFIX} must be followed by 64 hexadecimal digits")
        return Key(name, bytes.fromhex(digest))
    if len(secret) < MIN_CHARACTERS:
        raise SettingError(f"{where}: a key must have at least {MIN_CHARACTERS} characters, got {len(secret)}")
    if not _SECRET.fullmatch(secret):
        raise SettingError(f"{where}: a key must be printable ASCII without spaces, commas or colons")
    return Key(name, _digest(secret.encode()))


def _refuse_duplicates(keys: tuple[Key, ...]) -> None:
    names: dict[str, None] = {}
    digests: dict[bytes, str] = {}
    for key in keys:
        if key.name in names:
            raise SettingError(f"{KEYS_VARIABLE}: two keys have the name {key.name}")
        if key.digest in digests:
            raise SettingError(f"{KEYS_VARIABLE}: {digests[key.digest]} and {key.name} are the same key")
        names[key.name], digests[key.digest] = None, key.name


def keep_only_digests(variables: MutableMapping[str, str]) -> None:
    """Replace all keys by their digests, so that processes that inherit these variables never see a key.

    Invalid settings stay unchanged: `read_keys` reports them later.
    """
    with suppress(SettingError):
        keys = read_keys(variables)
        variables.pop(KEYS_FILE_VARIABLE, None)
        if keys:
            variables[KEYS_VARIABLE] = ",".join(map(str, keys))


def name_of_key(keys: tuple[Key, ...], headers: Headers) -> str | None:
    """The name of the key that a request carries, if it is one of `keys`. The time does not depend on which one it is."""
    found = None
    for presented in _presented(headers):
        digest = _digest(presented)
        for key in keys:
            if hmac.compare_digest(digest, key.digest):
                found = found or key.name
    return found


def carries_key(headers: Headers) -> bool:
    """Whether a request carries any key, valid or not. Clients without one may send an empty header, or only a scheme."""
    return bool(_presented(headers))


def _presented(headers: Headers) -> list[bytes]:
    """The keys in `Authorization: Bearer KEY`, `Authorization: Basic base64(anything:KEY)` and `X-API-Key: KEY`."""
    scheme, _, value = headers.get("authorization", "").strip().partition(" ")
    credentials = value.strip().encode("latin-1")
    if scheme.lower() == "basic":
        try:
            credentials = base64.b64decode(credentials, validate=True).partition(b":")[2]
        except binascii.Error:
            credentials = b""
    elif scheme.lower() != "bearer":
        credentials = b""
    return [given for given in (credentials, headers.get("x-api-key", "").strip().encode("latin-1")) if given]


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def _make(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise SystemExit("NAME must be 1 to 64 letters, digits, '_', '-' and '.', starting with a letter or digit")
    secret = secrets.token_urlsafe(32)
    print(f"The new key of {name}, shown only once and stored nowhere:\n\n  {secret}\n")
    print(f"Add this line to the file that {KEYS_FILE_VARIABLE} names, or to {KEYS_VARIABLE}. It does not reveal the key:\n")
    print(f"  {Key(name, _digest(secret.encode()))}")


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: python -m stable_diffusion.keys NAME")
    _make(sys.argv[1])
