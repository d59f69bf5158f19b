"""What every door needs to have something drawn: the runner, which model it has, where jobs stand, what is uploaded.

Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import bentoml

from stable_diffusion.decoding import Decoding
from stable_diffusion.draining import Unfinished
from stable_diffusion.jobs import Jobs
from stable_diffusion.readiness import Readiness
from stable_diffusion.safety import SafetyPolicy
from stable_diffusion.uploads import Uploads
from stable_diffusion.weights import ModelFolder


@dataclass(frozen=True)
class Backend:
    """`model` says which model the runner has loaded, or raises ModelFolderError; `policy` what is checked, or raises SettingError."""

    runner: bentoml.Runner
    model: Callable[[], ModelFolder]
    policy: Callable[[], SafetyPolicy]
    jobs: Jobs
    unfinished: Unfinished
    uploads: Uploads = field(default_factory=Uploads)
    decoding: Decoding = field(default_factory=Decoding)
    followers: set[object] = field(default_factory=set)  # of jobs

    @cached_property
    def readiness(self) -> Readiness:
        return Readiness(self.runner)
