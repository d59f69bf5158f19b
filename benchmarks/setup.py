"""The settings that all contenders share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stable_diffusion.core.types import Precision


@dataclass(frozen=True)
class Setup:
    """The settings of all contenders. `side`: pixels. `cache`: the folder of measured batch limits; None: each measures its own."""

    model: Path
    precision: Precision
    side: int
    cuda_graphs: bool = False
    cache: Path | None = None
