"""One folder that all processes of a server share, and only they: what one of them knows and another is asked for.

Named by the first process, which removes it when it ends; the others find the name in their environment.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import secrets
import shutil
import tempfile
from pathlib import Path

_VARIABLE = "SD_SHARED_FOLDER"


def name_shared_folder() -> None:
    """To be called where every process of a server comes by before it starts another one."""
    if _VARIABLE in os.environ:
        return
    folder = Path(tempfile.gettempdir()) / f"stable_diffusion-{secrets.token_hex(8)}"
    os.environ[_VARIABLE] = str(folder)
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # a forked child runs this too
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)


def shared_folder() -> Path:
    """The folder, made if it is not there, for this user alone. Raises OSError where that cannot be."""
    folder = Path(os.environ[_VARIABLE])
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def server_token() -> str:
    """The same in all processes of this server, and in no other server; tells nothing of the folder."""
    return hashlib.sha256(os.environ[_VARIABLE].encode()).hexdigest()[:16]
