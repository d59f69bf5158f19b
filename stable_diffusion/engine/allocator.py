"""Tells the C library's memory allocator to keep what a step frees, because the next step asks for the same again.

By default glibc returns large blocks to the system, which hands them out again page by page and zeroed.
"""

from __future__ import annotations

import ctypes
import logging
import sys

logger = logging.getLogger("stable_diffusion")

# Numbers of <malloc.h>; mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEPT_BYTES = 512 * 2**20
_MMAP_THRESHOLD_MAX = 32 * 2**20  # glibc's maximum


def keep_freed_memory() -> bool:
    """Keep freed memory in this process from now on, up to half a gigabyte per computing thread. False without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or not (mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)):
        logger.info("The C library's allocator cannot keep freed memory; steps of many images are slower on a CPU.")
        return False
    return True
