"""Which pictures the safety checker looks at: the operator's policy, and what a request may change of it.

Knows nothing of the checker itself, nor of HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from stable_diffusion.core.errors import InvalidRequest, SettingError

SafetyPolicy = Literal["always", "default-on", "off"]
SAFETY_VARIABLE = "SD_SAFETY"


def safety_policy(environment: Mapping[str, str], *, model_name: str, has_checker: bool) -> SafetyPolicy:
    """What SD_SAFETY asks for, by default "default-on".

    Raises SettingError for another value, and for "always" with a model that has no safety checker.
    """
    asked_for = environment.get(SAFETY_VARIABLE, "").strip() or "default-on"
    for policy in _POLICIES:
        if policy == asked_for:
            if policy == "always" and not has_checker:
                raise SettingError(
                    f"{SAFETY_VARIABLE}=always, but the model {model_name} has no safety checker: serve one that has, "
                    f"or set {SAFETY_VARIABLE} to default-on or off"
                )
            return policy
    raise SettingError(f"{SAFETY_VARIABLE} is {asked_for[:60]!r}, allowed are {', '.join(_POLICIES)}")


_POLICIES: tuple[SafetyPolicy, ...] = get_args(SafetyPolicy)


def is_checked(asked: bool | None, policy: SafetyPolicy) -> bool:
    """Whether the checker looks at a picture for which a request asks so, asks not to, or says nothing (None).

    Raises InvalidRequest where the policy is always and the request asks not to.
    """
    if policy == "always" and asked is False:
        raise InvalidRequest("safety_check: must be true or left out, this server checks every picture", field="safety_check")
    return policy != "off" if asked is None else asked
