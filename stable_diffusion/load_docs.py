"""Load and deadlines in the OpenAPI document: what every operation that draws may be told, and may answer, because of them.

Knows nothing of how requests are answered.
"""

from __future__ import annotations

from typing import Any

from stable_diffusion.limits import MAX_TIMEOUT_S
from stable_diffusion.reading import TIMEOUT_HEADER

TIMEOUT_PARAMETER: dict[str, Any] = {
    "name": TIMEOUT_HEADER,
    "in": "header",
    "description": f"Seconds until the answer has to be there, above 0, at most {MAX_TIMEOUT_S:.0f}, which is the default. A request that "
    "cannot be met is refused at once, one that is late is dropped: 504.",
    "schema": {"type": "string", "pattern": r"^[0-9]{1,4}(\.[0-9]{1,3})?$"},
}
LOAD_ERRORS = {
    "429": "As much work as is allowed has been taken on (`queue_full`). The header Retry-After says when there should be room.",
    "503": "The model process is being started (`model_loading`: the message says how far it is), has ended or cannot be reached "
    "(`model_unavailable`), or the server is being stopped (`shutting_down`). The header Retry-After says when to try again.",
    "504": f"The time that {TIMEOUT_HEADER} allows cannot be enough, or was not (`deadline_exceeded`).",
}
