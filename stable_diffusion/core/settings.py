"""What whoever runs the server may set of its limits, by environment variables: read and checked in one place.

Knows nothing of what is limited by them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from stable_diffusion.core.errors import SettingError

MAX_TIMEOUT_S = 3600.0  # of a request; the configuration.yaml of both services has the same number for BentoML


@dataclass(frozen=True)
class Limits:
    """Seconds, and pictures at once."""

    queue_s: float = 600.0
    queue_pictures: float = 200.0
    stuck_step_s: float = 60.0
    stop_grace_s: float = MAX_TIMEOUT_S


_DAY_S = 86_400.0
# Each picture holds one of the 800 connections that BentoML lets an API worker have to the model process, above the limit twice as many.
_MOST_PICTURES = 400.0
# Of each field its variable, and the most that it may be.
VARIABLES = {
    "queue_s": ("SD_MAX_QUEUE_S", _DAY_S),
    "queue_pictures": ("SD_MAX_QUEUE_PICTURES", _MOST_PICTURES),
    "stuck_step_s": ("SD_STUCK_STEP_S", _DAY_S),
    "stop_grace_s": ("SD_STOP_GRACE_S", _DAY_S),
}


def read_limits(environment: Mapping[str, str]) -> Limits:
    """Raises SettingError, which names the variable."""
    set_ones = {field: limits for field, limits in VARIABLES.items() if environment.get(limits[0], "").strip()}
    return Limits(**{field: _positive(environment[name], name, most) for field, (name, most) in set_ones.items()})


def _positive(text: str, name: str, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= most:
        raise SettingError(f"{name} must be a number above 0, at most {most:.0f}, not {text[:60]!r}")
    return value
