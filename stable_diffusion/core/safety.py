"""Which pictures the safety checker looks at: the operator's policy, and what a request may change of it.

Knows nothing of the checker itself, nor of HTTP, nor of how the operator says it.
"""

from __future__ import annotations

from typing import Literal

from stable_diffusion.core.errors import InvalidRequest

SafetyPolicy = Literal["always", "default-on", "off"]


def is_checked(asked: bool | None, policy: SafetyPolicy) -> bool:
    """Whether the checker looks at a picture for which a request asks so, asks not to, or says nothing (None).

    Raises InvalidRequest where the policy is always and the request asks not to.
    """
    if policy == "always" and asked is False:
        raise InvalidRequest("safety_check: must be true or left out, this server checks every picture", field="safety_check")
    return policy != "off" if asked is None else asked
