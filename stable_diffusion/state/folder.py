"""The folder through which the processes of one server share data.

The first process names it and removes it at its end; the others find its name in their environment.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from stable_diffusion.core.settings import SHARED_FOLDER_VARIABLE


def name_shared_folder() -> None:
    """Name the folder, unless it has a name. Every process of a server must call this before it starts another process."""
    if SHARED_FOLDER_VARIABLE in os.environ:
        return
    folder = Path(tempfile.gettempdir()) / f"stable_diffusion-{secrets.token_hex(8)}"
    os.environ[SHARED_FOLDER_VARIABLE] = str(folder)
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # a forked child runs the handler too
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)


def shared_folder() -> Path:
    """The folder, created if missing and accessible to this user only. Raises OSError if it cannot be created."""
    folder = Path(os.environ[SHARED_FOLDER_VARIABLE])
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def server_token() -> str:
    """An identifier of this server, the same in all of its processes. It does not reveal the folder."""
    return hashlib.sha256(os.environ[SHARED_FOLDER_VARIABLE].encode()).hexdigest()[:16]
