"""How evenly machines share the queue: machines whose images only take time, and jobs that all come at once. `python -m benchmarks.queue`.

Each machine is a thread that takes, begins and ends jobs as an API worker and a model process do, in a real store. It measures the queue
and the store, not servers. The figures stand in docs/scale.md.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.store import started_store
from stable_diffusion.core.errors import GenerationFailed, TooManyJobs
from stable_diffusion.core.settings import StoreAddress, read_settings
from stable_diffusion.core.types import Task, Ticket
from stable_diffusion.state.redis_jobs import RedisJobs
from stable_diffusion.state.shared_store import SharedStore

PLACES = 4  # images that share a step of a machine
_LOOK_S = 0.125  # two API workers that look four times a second
_TASK = Task("txt2img", "a small red circle on a blue background", "", 512, 512, 50, 7.5, 1, "PNDMScheduler", True)


class Machine:
    """`image_s`: how long each image takes."""

    def __init__(self, address: StoreAddress, name: str, image_s: float, waits_s: list[float], accepted_s: dict[str, float]) -> None:
        self.jobs = RedisJobs(SharedStore(address), name)
        self.done = 0
        self._image_s = image_s
        self._waits_s = waits_s
        self._accepted_s = accepted_s
        self._running: list[tuple[float, Ticket]] = []

    def run(self, stop: threading.Event) -> None:
        self.jobs.to_cancel(0)  # it lives, and has places
        while not stop.is_set():
            while (taken := self.jobs.take(PLACES)) is not None:
                for task, ticket in taken.images:
                    self.jobs.begin(ticket, task, 0)
                    self._waits_s.append(time.monotonic() - self._accepted_s[ticket.job_id])
                    self._running.append((time.monotonic() + self._image_s, ticket))
            next_s = min((end_s for end_s, _ in self._running), default=time.monotonic() + _LOOK_S)
            stop.wait(max(0.0, min(next_s - time.monotonic(), _LOOK_S)))
            for one in [one for one in self._running if one[0] <= time.monotonic()]:
                self._running.remove(one)
                self.jobs.end(one[1], GenerationFailed("only time passed"))
                self.done += 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how evenly machines share the queue.")
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each image")
    arguments = parser.parse_args()
    print(f"{'machines':>8}{'jobs':>6}{'took s':>8}{'ideal s':>9}{'mean wait s':>13}{'ideal wait s':>14}{'of a machine':>15}")
    for machines, count in ((1, arguments.jobs // 16), (16, arguments.jobs)):
        with tempfile.TemporaryDirectory(prefix="queue-") as folder, started_store(Path(folder)) as (port, _):
            address = read_settings({"SD_SHARED_STATE": f"redis://127.0.0.1:{port}"}).shared_state
            assert address is not None
            _measure(address, machines, count, arguments.seconds)


def _measure(address: StoreAddress, number: int, count: int, image_s: float) -> None:
    stop, waits_s, accepted_s = threading.Event(), list[float](), dict[str, float]()
    machines = [Machine(address, f"machine {one}", image_s, waits_s, accepted_s) for one in range(number)]
    threads = [threading.Thread(target=one.run, args=(stop,)) for one in machines]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    began_s = time.monotonic()
    client = RedisJobs(SharedStore(address), "client")
    for job in range(count):
        ticket = Ticket(f"{job:032x}", f"owner {job % 20}", asynchronous=True)
        while True:
            accepted_s[ticket.job_id] = time.monotonic()
            try:
                client.accept(ticket, [_TASK], None, "")
                break
            except TooManyJobs:
                time.sleep(0.01)
    while sum(one.done for one in machines) < count:
        time.sleep(0.005)
    took_s = time.monotonic() - began_s
    stop.set()
    for thread in threads:
        thread.join()
    places = number * PLACES
    # One queue in front of all places: image number n begins when n // places images have been made one after the other at its place.
    begins_s = [job // places * image_s for job in range(count)]
    came_s = [accepted_s[f"{job:032x}"] - began_s for job in range(count)]
    ideal_wait_s = sum(max(0.0, begin - came) for begin, came in zip(begins_s, came_s, strict=True)) / count
    done = sorted(one.done for one in machines)
    print(
        f"{number:>8}{count:>6}{took_s:>8.2f}{-(-count // places) * image_s:>9.2f}{sum(waits_s) / count:>13.2f}{ideal_wait_s:>14.2f}"
        f"{f'{done[0]} to {done[-1]} jobs':>17}",
        flush=True,
    )


if __name__ == "__main__":
    main()
