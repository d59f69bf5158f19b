"""Freed memory is kept: told by the page faults that the system counts, in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# On a thread of its own, as the engine has: glibc gives its memory back sooner than the first thread's.
TAKE_AND_FREE = """
import resource, threading
import torch
from stable_diffusion.engine.allocator import keep_freed_memory
{call}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def take(blocks):
    [torch.ones(2**18) for _ in range(blocks)]  # of a MiB
def run():
    for blocks in (10, 40):
        for _ in range(8):
            take(blocks)
    before = faults()
    for _ in range(5):
        take(40)
    print(faults() - before)
threading.Thread(target=run).start()
"""


def page_faults(call: str) -> int:
    output = subprocess.run([sys.executable, "-c", TAKE_AND_FREE.format(call=call)], capture_output=True, text=True, check=True).stdout
    return int(output.split()[-1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_a_step_freed_is_there_for_the_next_one() -> None:
    # 40 blocks of 256 pages, five times over.
    assert page_faults("") > 20_000
    assert page_faults("assert keep_freed_memory()") < 500
