"""What a job costs the Redis or Valkey that machines share: processor time, network and memory of each call. `python -m benchmarks.store`.

It starts a store of its own and makes the calls that servers make, without servers. The figures stand in docs/scale.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import redis
from PIL import Image

from stable_diffusion.core.settings import read_settings
from stable_diffusion.core.types import GeneratedImage, Progress, Task, Ticket
from stable_diffusion.state.job_record import as_png
from stable_diffusion.state.redis_jobs import RedisJobs
from stable_diffusion.state.redis_rates import RedisRateLimit
from stable_diffusion.state.shared_store import SharedStore
from stable_diffusion.state.sqlite_rates import SqliteRateLimit

OWNERS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a job costs the store that machines share.")
    parser.add_argument("--jobs", type=int, default=400)
    jobs_measured = parser.parse_args().jobs
    with tempfile.TemporaryDirectory(prefix="store-") as folder, started_store(Path(folder)) as (port, client):
        address = read_settings({"SD_SHARED_STATE": f"redis://127.0.0.1:{port}"}).shared_state
        assert address is not None
        _measure(SharedStore(address), client, jobs_measured, Path(folder))


def _measure(store: SharedStore, client: Any, count: int, folder: Path) -> None:
    jobs = RedisJobs(store, "machine", kept_bytes=1 << 40)
    for number in range(-(-count // 64)):  # 64 jobs may be unfinished for each
        RedisJobs(store, f"other {number}").to_cancel(0)
    limit = RedisRateLimit(store, 100_000, SqliteRateLimit(lambda: folder, 100_000))
    image, preview = _photograph(512), _photograph(64)
    tickets = [Ticket(f"{number:032x}", f"owner {number % OWNERS}", asynchronous=True) for number in range(count)]
    task = Task("txt2img", "a small red circle on a blue background, " * 4, "", 512, 512, 50, 7.5, 1, "PNDMScheduler", True)
    outcome = GeneratedImage(image, False, "", "", "cuda", "float16", waited_s=0.1)
    taken: list[Ticket] = []

    def take(_: int) -> None:
        found = jobs.take(10**9)
        assert found is not None
        taken.extend(ticket for _, ticket in found.images)

    def note(number: int, shown: Image.Image | None = None) -> None:
        jobs.note({taken[number]: Progress(0, 20, 50, 3.5, shown)})

    print(f"{client.info('server')['redis_version']=}, {os.cpu_count()} cores, PNG of {len(as_png(image)) >> 10} KiB, {count} jobs\n")
    print(f"{'call':<34}{'processor us':>13}{'bytes in':>11}{'bytes out':>11}{'round trip ms':>15}")
    empty = client.info("memory")["used_memory"]
    _phase(client, "rate limit", count, lambda number: limit.wait_s(tickets[number].owner))
    _phase(client, "accept", count, lambda number: jobs.accept(tickets[number], [task], f"key {number}", "0" * 64))
    waiting = client.info("memory")["used_memory"]
    _phase(client, "take", count, take)
    _phase(client, "take, nothing waits", count, lambda _: jobs.take(10**9))
    _phase(client, "begin", count, lambda number: jobs.begin(taken[number], task, 0))
    _phase(client, "cancellations, none", count, lambda _: jobs.to_cancel(0))
    _phase(client, "progress of one image", count, note)
    _phase(client, "progress of one image and preview", count, lambda number: note(number, preview))
    _phase(client, "state of an unfinished job", count, lambda number: jobs.get(tickets[number].job_id))
    _phase(client, "end with image", count, lambda number: jobs.end(taken[number], outcome))
    ended = client.info("memory")["used_memory"]
    _phase(client, "state and image of a finished job", count, lambda number: jobs.get(tickets[number].job_id))
    images = sum(int(client.memory_usage(key)) for key in client.keys("*:picture:*"))
    print(f"\nmemory of a job that waits: {(waiting - empty) // count} bytes; of one that has ended, without its image: ", end="")
    print(f"{(ended - empty - images) // count} bytes; of its image: {images // count} bytes")


def _phase(client: Any, name: str, count: int, call: Callable[[int], object]) -> None:
    call_once = client.info("cpu")  # loads what INFO itself needs
    before, began_s, cpu_s = client.info("stats"), time.monotonic(), _processor_s(call_once)
    for number in range(count):
        call(number)
    took_s = time.monotonic() - began_s
    used_s, after = _processor_s(client.info("cpu")) - cpu_s, client.info("stats")
    received, sent = ((after[field] - before[field]) // count for field in ("total_net_input_bytes", "total_net_output_bytes"))
    print(f"{name:<34}{used_s / count * 1e6:>13.0f}{received:>11}{sent:>11}{took_s / count * 1e3:>15.2f}", flush=True)


def _processor_s(info: dict[str, float]) -> float:
    return info["used_cpu_user_main_thread"] + info["used_cpu_sys_main_thread"]


def _photograph(side: int) -> Image.Image:
    """Smooth areas with noise, which PNG compresses about as well as a photograph."""
    noise = np.random.default_rng(0)
    coarse = Image.fromarray(noise.integers(0, 255, (16, 16, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(coarse, dtype=np.int16) + noise.integers(-4, 5, (side, side, 3))).clip(0, 255).astype(np.uint8))


@contextmanager
def started_store(folder: Path) -> Iterator[tuple[int, Any]]:
    """A store in `folder` until the block ends: its port, and a client."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        raise SystemExit("redis-server is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "yes"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    client = redis.Redis(port=port)
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                time.sleep(0.05)
        yield port, client
    finally:
        client.close()
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
