"""The settings that all contenders share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stable_diffusion.core.types import Precision


@dataclass(frozen=True)
class Setup:
    """The settings of all contenders. `side`: pixels.

    `execution`: the way of computing, as SD_EXECUTION names it. `cache`: the folder of measurements; None: each
    makes its own.
    """

    model: Path
    precision: Precision
    side: int
    execution: str = "eager"
    cache: Path | None = None
