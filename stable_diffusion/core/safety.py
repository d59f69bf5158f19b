"""Which images the safety checker checks: the operator's policy, and what a request may change about it.

The variable that sets the policy is in `settings.py`; the checker itself belongs to the engine.
"""

from __future__ import annotations

from typing import Literal

from stable_diffusion.core.errors import InvalidRequest

SafetyPolicy = Literal["always", "default-on", "off"]


def is_checked(asked: bool | None, policy: SafetyPolicy) -> bool:
    """Whether the checker checks an image. `asked`: the request's field, None if it is absent.

    Raises InvalidRequest if the policy is always and the request asks for no check.
    """
    if policy == "always" and asked is False:
        raise InvalidRequest("safety_check: must be true or omitted, this server checks every image", field="safety_check")
    return policy != "off" if asked is None else asked
