"""Which images the safety checker sees: the operator's policy, and what a request may change about it.

The variable that sets the policy is in `settings.py`; the checker itself belongs to the engine.
"""

from __future__ import annotations

from typing import Literal

from stable_diffusion.core.errors import InvalidRequest

SafetyPolicy = Literal["always", "default-on", "off"]


def is_checked(asked: bool | None, policy: SafetyPolicy) -> bool:
    """Whether the checker sees an image. `asked` is what the request says: True, False, or None if it says nothing.

    Raises InvalidRequest if the policy is always and the request asks for no check.
    """
    if policy == "always" and asked is False:
        raise InvalidRequest("safety_check: must be true or left out, this server checks every picture", field="safety_check")
    return policy != "off" if asked is None else asked
