"""The C library's memory allocator, told to keep what a step frees: the next step asks for the same again.

By default glibc gives large blocks back to the system, which hands them out again page by page and zeroed.
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
_MMAP_THRESHOLD_MAX = 32 * 2**20  # glibc takes no more


def keep_freed_memory() -> bool:
    """For this process, from now on. Up to half a gigabyte stays taken for each thread that computes. False without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or not (mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)):
        logger.info("The C library's allocator cannot be told to keep memory; steps of many pictures are slower on a CPU.")
        return False
    return True
