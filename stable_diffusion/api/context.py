"""What every API needs: the connection to the model processes, the loaded model, and the limits on uploads.

Created once per API worker and passed to every `make_routes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from stable_diffusion.core.safety import SafetyPolicy
from stable_diffusion.models.folder import ModelFolder
from stable_diffusion.models.loras import LoraFolder, Loras
from stable_diffusion.runner.client import RunnerClient
from stable_diffusion.state.jobs import Jobs
from stable_diffusion.web.decode_queue import Decoding
from stable_diffusion.web.upload_budget import Uploads


@dataclass(frozen=True)
class Served:
    """The model, safety policy and LoRAs that a request is resolved against."""

    model: ModelFolder
    policy: SafetyPolicy
    loras: Callable[[], Loras]  # reads their folder


@dataclass(frozen=True)
class Context:
    """`model` returns the model that the runner has loaded, or raises ModelFolderError; `policy` may raise SettingError."""

    client: RunnerClient
    model: Callable[[], ModelFolder]
    policy: Callable[[], SafetyPolicy]
    is_shared_state_reachable: Callable[[], bool] | None = None  # None: this machine shares nothing with others
    uploads: Uploads = field(default_factory=Uploads)
    decoding: Decoding = field(default_factory=Decoding)

    @cached_property
    def lora_folder(self) -> LoraFolder:
        return LoraFolder(self.model().loras, self.model())

    def served(self) -> Served:
        """Raises what `model` and `policy` raise."""
        return Served(self.model(), self.policy(), lambda: self.lora_folder.look())

    @property
    def jobs(self) -> Jobs:
        return self.client.jobs
