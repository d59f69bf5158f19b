"""Says what the parts of a deployment that nobody expects cost, from the prices of one region.

Does not ask AWS, and knows nothing of discounts. bentoctl/README.md lists the costs of all parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HOURS_A_MONTH = 730
# terraform/locals.tf makes these. Valkey costs a fifth less than Redis OSS on the same node, which is 0.032 dollars an hour.
STORE_NODE_TYPE = "cache.t4g.small"
STORE_NODES = 2
STORE_NODE_DOLLARS_AN_HOUR = 0.0256
PRICES_OF = "us-east-1, estimated on 2026-11-28 and not checked against AWS's price list"


def cost_notes(spec: Mapping[str, Any]) -> list[str]:
    """A sentence for each part of a checked `spec` that costs money even if no machine works."""
    if not spec["shared_state"]:
        return []
    dollars = STORE_NODES * STORE_NODE_DOLLARS_AN_HOUR * HOURS_A_MONTH
    return [
        f"spec.shared_state: the Valkey costs about {dollars:.0f} dollars a month, with or without work: {STORE_NODES} {STORE_NODE_TYPE} "
        f"at {STORE_NODE_DOLLARS_AN_HOUR} dollars an hour each ({PRICES_OF}; most other regions cost more)"
    ]
