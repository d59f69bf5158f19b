"""A job store whose time a test lets pass, whichever store it is. The fixture `store` of unit tests makes one of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stable_diffusion.state.jobs import JobQueue, Jobs


@dataclass(frozen=True)
class Store:
    jobs: Jobs
    let_pass: Callable[[float], None]  # so many seconds
    queue: JobQueue | None = None
