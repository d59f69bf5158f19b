"""All environment variables that the operator can set: their names and their rules.

`Settings` shows no secret: `server/access/keys.py` parses the entries of the API keys, and an address leaves its password out.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args
from urllib.parse import unquote, urlsplit

from stable_diffusion.core.addresses import is_loopback
from stable_diffusion.core.errors import SettingError
from stable_diffusion.core.safety import SafetyPolicy

MODEL_VARIABLE = "SD_MODEL"
VAE_VARIABLE = "SD_VAE"
SAFETY_VARIABLE = "SD_SAFETY"
LORAS_VARIABLE = "SD_LORAS"
EMBEDDINGS_VARIABLE = "SD_EMBEDDINGS"
LOG_PROMPTS_VARIABLE = "SD_LOG_PROMPTS"
EXECUTION_VARIABLE = "SD_EXECUTION"
KEYS_VARIABLE = "SD_API_KEYS"
KEYS_FILE_VARIABLE = "SD_API_KEYS_FILE"
OPEN_VARIABLE = "SD_OPEN"
WITHOUT_KEYS_VARIABLE = "SD_WITHOUT_KEYS"
RATE_LIMIT_VARIABLE = "SD_RATE_LIMIT"
SHARED_STATE_VARIABLE = "SD_SHARED_STATE"
# A server's first process sets these for the others: the operator's thread settings, before BentoML overwrites them, and the folder
# through which the processes share data.
OPERATORS_THREADS_VARIABLE = "SD_OPERATORS_THREADS"
SHARED_FOLDER_VARIABLE = "SD_SHARED_FOLDER"
SET_BY_THE_SERVER = frozenset({OPERATORS_THREADS_VARIABLE, SHARED_FOLDER_VARIABLE})

MAX_TIMEOUT_S = 3600.0  # of a request; configuration.yaml of both services sets the same number for BentoML
OPENABLE = ("docs", "metrics")
EXECUTIONS = ("auto", "eager")
EXECUTION_PARTS = ("channels_last", "compile", "graphs")  # any of them, joined by "+"

_THREAD_PREFIXES = ("OMP_", "GOMP_", "MKL_NUM", "MKL_DYNAMIC", "KMP_")
_QUOTED_CHARACTERS = 60  # of a wrong value, in messages
_POLICIES: tuple[SafetyPolicy, ...] = get_args(SafetyPolicy)
_ON = ("1", "true", "yes", "on")
_OFF = ("0", "false", "no", "off", "")
_MAX_REQUESTS_PER_MINUTE = 100_000
_DAY_S = 86_400.0
# Each image holds one of the 800 connections that BentoML allows from an API worker to the model process. Owners' shares may double
# the limit.
_MAX_QUEUED_IMAGES = 400.0
# For each field of Limits: its variable and its maximum.
LIMIT_VARIABLES = {
    "queue_s": ("SD_MAX_QUEUE_S", _DAY_S),
    "queue_images": ("SD_MAX_QUEUE_PICTURES", _MAX_QUEUED_IMAGES),
    "stuck_step_s": ("SD_STUCK_STEP_S", _DAY_S),
    "stop_grace_s": ("SD_STOP_GRACE_S", _DAY_S),
}
_PREFIX = "SD_"
# Names of earlier versions, each with what to do. A start that ignored one would compute in another way than the operator has chosen.
_RENAMED = {"SD_CUDA_GRAPHS": f"is now {EXECUTION_VARIABLE}: graphs for on, eager for off, or auto to have the fastest way measured"}
_NAMES = (
    *(MODEL_VARIABLE, VAE_VARIABLE, SAFETY_VARIABLE, LORAS_VARIABLE, EMBEDDINGS_VARIABLE, LOG_PROMPTS_VARIABLE, EXECUTION_VARIABLE),
    *(KEYS_VARIABLE, KEYS_FILE_VARIABLE, OPEN_VARIABLE, WITHOUT_KEYS_VARIABLE, RATE_LIMIT_VARIABLE),
    SHARED_STATE_VARIABLE,
    *(name for name, _ in LIMIT_VARIABLES.values()),
)


@dataclass(frozen=True)
class Limits:
    """Limits in seconds, and the number of images in the queue."""

    queue_s: float = 600.0
    queue_images: float = 200.0
    stuck_step_s: float = 60.0
    stop_grace_s: float = MAX_TIMEOUT_S


@dataclass(frozen=True)
class StoreAddress:
    """Where the state lies that machines share. `database`: the number of one of the store's databases."""

    host: str
    port: int
    is_encrypted: bool
    user: str | None
    password: str | None = field(repr=False)
    database: int

    def __str__(self) -> str:
        """For messages: without user and password."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Settings:
    """All settings except the API keys."""

    model: str = ""  # "demo", "demo-xl", a folder or a file; empty: the one model in models/, else the demo model
    vae: str = ""  # a file; empty: what the model's own defaults say, else the model's autoencoder
    loras: str = ""  # a folder; empty: loras beside the weights
    embeddings: str = ""  # a folder of textual inversions; empty: embeddings beside the weights
    limits: Limits = Limits()
    safety: SafetyPolicy = "default-on"
    log_prompts: bool = False
    execution: str = "auto"  # or "eager", or some of EXECUTION_PARTS in their order, joined by "+"
    open: frozenset[str] = frozenset()  # the members of OPENABLE that need no key
    without_keys: bool = False
    requests_per_minute: int | None = None  # None: unlimited
    shared_state: StoreAddress | None = None  # None: this machine shares nothing with others


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Raises SettingError, which names the first wrong variable and what is allowed."""
    for name, hint in _RENAMED.items():
        if environment.get(name, "").strip():
            raise SettingError(f"{name} {hint}")
    return Settings(
        model=unquoted(environment, MODEL_VARIABLE),
        vae=unquoted(environment, VAE_VARIABLE),
        loras=unquoted(environment, LORAS_VARIABLE),
        embeddings=unquoted(environment, EMBEDDINGS_VARIABLE),
        limits=_limits(environment),
        safety=_safety(environment),
        log_prompts=_flag(environment, LOG_PROMPTS_VARIABLE),
        execution=_execution(environment),
        open=_open(environment),
        without_keys=_flag(environment, WITHOUT_KEYS_VARIABLE),
        requests_per_minute=_requests_per_minute(environment),
        shared_state=_shared_state(environment),
    )


def unknown_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that begin with SD_ and are no setting, each with the setting of the most similar name, or "".

    They may be misspelt, or belong to other programs: LibreChat reads SD_WEBUI_URL.
    """
    unknown = (name for name in sorted(environment) if name.startswith(_PREFIX) and name not in {*_NAMES, *SET_BY_THE_SERVER})
    return {name: next(iter(difflib.get_close_matches(name, _NAMES, 1, 0.8)), "") for name in unknown}


def read_limits(environment: Mapping[str, str]) -> Limits:
    """Raises SettingError like `read_settings`."""
    return read_settings(environment).limits


def safety_policy(environment: Mapping[str, str], *, model_name: str, has_checker: bool) -> SafetyPolicy:
    """The safety policy for a model that has a checker or has none.

    Raises SettingError like `read_settings`, and for "always" with a model without a safety checker.
    """
    policy = read_settings(environment).safety
    if policy == "always" and not has_checker:
        raise SettingError(
            f"{SAFETY_VARIABLE}=always, but the model {model_name} has no safety checker: serve one that has, "
            f"or set {SAFETY_VARIABLE} to default-on or off"
        )
    return policy


def is_in_quotes(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"


def unquoted(environment: Mapping[str, str], name: str) -> str:
    """The value of a variable without spaces around it, "" if it is not set. Raises SettingError if it is in quotes."""
    text = environment.get(name, "").strip()
    if is_in_quotes(text):
        raise SettingError(f"{name}: the value is in quotes. Leave them out: Docker keeps the quotes in an env file")
    return text


def _flag(environment: Mapping[str, str], name: str) -> bool:
    """The value of a variable that is on or off. All such variables follow this rule."""
    text = unquoted(environment, name)
    if text.lower() in _ON:
        return True
    if text.lower() in _OFF:
        return False
    raise SettingError(f"{name} must be 1, true, yes or on, or else 0, false, no, off or empty, not {_quoted(text)}")


def _limits(environment: Mapping[str, str]) -> Limits:
    given = {field: (name, maximum) for field, (name, maximum) in LIMIT_VARIABLES.items() if unquoted(environment, name)}
    return Limits(**{field: _positive(unquoted(environment, name), name, maximum) for field, (name, maximum) in given.items()})


def _positive(text: str, name: str, maximum: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= maximum:
        raise SettingError(f"{name} must be a number above 0, at most {maximum:.0f}, not {_quoted(text)}")
    return value


def _safety(environment: Mapping[str, str]) -> SafetyPolicy:
    asked_for = unquoted(environment, SAFETY_VARIABLE) or Settings.safety
    for policy in _POLICIES:
        if policy == asked_for:
            return policy
    raise SettingError(f"{SAFETY_VARIABLE} is {_quoted(asked_for)}, allowed are {', '.join(_POLICIES)}")


def _open(environment: Mapping[str, str]) -> frozenset[str]:
    names = frozenset(name.strip() for name in unquoted(environment, OPEN_VARIABLE).split(",") if name.strip())
    if unknown := sorted(names - set(OPENABLE)):
        raise SettingError(f"{OPEN_VARIABLE}: {_quoted(unknown[0])} cannot be opened, only {' and '.join(OPENABLE)}")
    return names


def _execution(environment: Mapping[str, str]) -> str:
    text = unquoted(environment, EXECUTION_VARIABLE) or Settings.execution
    if text in EXECUTIONS:
        return text
    parts = [part.strip() for part in text.split("+")]
    if len(set(parts)) < len(parts) or not set(parts) <= set(EXECUTION_PARTS):
        raise SettingError(
            f"{EXECUTION_VARIABLE} must be {', '.join(EXECUTIONS)}, or one or more of {', '.join(EXECUTION_PARTS)} "
            f"joined by +, not {_quoted(text)}"
        )
    return "+".join(part for part in EXECUTION_PARTS if part in parts)


def _requests_per_minute(environment: Mapping[str, str]) -> int | None:
    text = unquoted(environment, RATE_LIMIT_VARIABLE)
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:7]) <= _MAX_REQUESTS_PER_MINUTE and len(text) <= 6):
        raise SettingError(
            f"{RATE_LIMIT_VARIABLE}: must be a whole number from 1 to {_MAX_REQUESTS_PER_MINUTE}, generation requests per minute, "
            f"not {_quoted(text)}"
        )
    return int(text)


def _shared_state(environment: Mapping[str, str]) -> StoreAddress | None:
    """No message contains the value, which may hold a password."""
    text = unquoted(environment, SHARED_STATE_VARIABLE)
    if not text:
        return None
    wrong = SettingError(f"{SHARED_STATE_VARIABLE} must be rediss://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE], or redis:// on this machine")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise wrong from None
    database = parts.path.removeprefix("/") or "0"
    is_whole = not parts.query and not parts.fragment and database.isascii() and database.isdigit() and len(database) < 4
    if parts.scheme not in ("redis", "rediss") or not host or not is_whole:
        raise wrong
    if parts.scheme == "redis" and host != "localhost" and not is_loopback(host):
        raise SettingError(
            f"{SHARED_STATE_VARIABLE}: redis:// would send images and the password unencrypted to another machine, "
            f"{host[:_QUOTED_CHARACTERS]}; use rediss://"
        )
    user, password = (None if part is None else unquote(part) for part in (parts.username, parts.password))
    return StoreAddress(host, port or 6379, parts.scheme == "rediss", user or None, password or None, int(database))


def _quoted(text: str) -> str:
    return repr(text[:_QUOTED_CHARACTERS])


def operators_threads(environment: Mapping[str, str]) -> str:
    """The operator's thread settings: "" if there are none, the number in OMP_NUM_THREADS if there is one, else the variables' names.

    In a model process BentoML has overwritten the operator's variables; the server's first process has kept their values.
    """
    if (kept := environment.get(OPERATORS_THREADS_VARIABLE)) is not None:
        return kept
    number = environment.get("OMP_NUM_THREADS", "").strip()
    return number if number.isdigit() else " ".join(sorted(name for name in environment if name.startswith(_THREAD_PREFIXES)))
