"""What every dialect needs: the model processes, which model they have, and the bounds of what is uploaded.

Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from stable_diffusion.core.safety import SafetyPolicy
from stable_diffusion.models.folder import ModelFolder
from stable_diffusion.runner.client import RunnerClient
from stable_diffusion.state.jobs import Jobs
from stable_diffusion.web.decode_queue import Decoding
from stable_diffusion.web.upload_budget import Uploads


@dataclass(frozen=True)
class Context:
    """`model` says which model the runner has loaded, or raises ModelFolderError."""

    client: RunnerClient
    model: Callable[[], ModelFolder]
    uploads: Uploads = field(default_factory=Uploads)
    decoding: Decoding = field(default_factory=Decoding)

    @property
    def jobs(self) -> Jobs:
        return self.client.jobs

    def policy(self) -> SafetyPolicy:
        """What the safety checker looks at. Raises SettingError."""
        return self.client.policy()
