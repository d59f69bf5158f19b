"""What the store that machines share costs one client over HTTP. `python -m benchmarks.shared_state`.

It sends the same requests to a server with the store and to one without, in turn.
It starts a store and two servers of its own, and knows only their HTTP.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import httpx

from benchmarks.store import started_store
from tests.http.servers import ROOT, Server, serve

WARM_UP_REQUESTS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what shared state costs one client over HTTP.")
    parser.add_argument("--requests", type=int, default=200, help="to each of the two servers")
    parser.add_argument("--steps", type=int, default=1, help="few, so that the generation hides nothing")
    parser.add_argument("--side", type=int, default=64, help="pixels")
    arguments = parser.parse_args()
    fields = {
        "prompt": "a red circle",
        "num_inference_steps": arguments.steps,
        "width": arguments.side,
        "height": arguments.side,
        "seed": 1,
    }
    with tempfile.TemporaryDirectory(prefix="shared-state-") as folder, ExitStack() as running:
        port, _ = running.enter_context(started_store(Path(folder)))
        alone = running.enter_context(_server(Path(folder) / "alone", {}))
        sharing = running.enter_context(_server(Path(folder) / "sharing", {"SD_SHARED_STATE": f"redis://127.0.0.1:{port}"}))
        clients = [running.enter_context(server.client()) for server in (alone, sharing)]
        for client in clients:
            for _ in range(WARM_UP_REQUESTS):
                _seconds(client, fields)
        durations_s: list[list[float]] = [[], []]
        for _ in range(arguments.requests):
            for client, kept in zip(clients, durations_s, strict=True):
                kept.append(_seconds(client, fields))
    _print(*durations_s)


def _server(home: Path, variables: dict[str, str]) -> AbstractContextManager[Server]:
    return serve(ROOT / "fp32", "service:svc", home, {"XDG_CACHE_HOME": str(home), **variables})


def _seconds(client: httpx.Client, fields: dict[str, object]) -> float:
    began = time.perf_counter()
    client.post("/txt2img", json=fields).raise_for_status()
    return time.perf_counter() - began


def _print(alone_s: list[float], sharing_s: list[float]) -> None:
    print("| | median, ms | 90 %, ms |\n|---|---|---|")
    for name, durations_s in (("one machine's own state", alone_s), ("shared state", sharing_s)):
        print(f"| {name} | {statistics.median(durations_s) * 1000:.1f} | {statistics.quantiles(durations_s, n=10)[-1] * 1000:.1f} |")
    print(f"\nShared state adds {(statistics.median(sharing_s) - statistics.median(alone_s)) * 1000:+.1f} ms to the median.")


if __name__ == "__main__":
    main()
