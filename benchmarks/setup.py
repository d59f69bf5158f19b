"""What every contender generates with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stable_diffusion.core.types import Precision


@dataclass(frozen=True)
class Setup:
    """What is drawn with. `side`: pixels. `cache`: where measured batch limits are kept; None: each contender measures its own."""

    model: Path
    precision: Precision
    side: int
    cuda_graphs: bool = False
    cache: Path | None = None
