"""A fleet on this computer: servers, a Redis or Valkey and HAProxy on loopback ports, started together and ended together.

`make fleet N=2`. To try what machines share; one computer is no faster for it.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[1]
_READY_TIMEOUT_S = 300
_STOP_TIMEOUT_S = 60
_LOOK_S = 0.5

Processes = dict[str, "subprocess.Popen[bytes]"]  # by the names of their logs

_HAPROXY = """defaults
  mode http
  timeout connect 2s
  timeout client 3600s
  timeout server 3600s
frontend public
  bind 127.0.0.1:{port}
  default_backend machines
backend machines
  balance leastconn
  option httpchk GET /readyz
  http-check expect status 200
  http-response set-header served-by %s
{servers}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Start servers that share their jobs, behind HAProxy, on this computer.")
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--port", type=int, default=3000, help="of HAProxy")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16"))
    arguments = parser.parse_args()
    if not 1 <= arguments.servers <= 16:
        raise SystemExit("N must be 1 to 16")
    store, balancer = _program("redis-server", "valkey-server"), _program("haproxy")
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts programs in the background with SIGINT ignored
        signal.signal(number, _interrupt)
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder, ExitStack() as running:
        try:
            _run(running, arguments, store, balancer, Path(folder))
        except KeyboardInterrupt:
            print("Stopping: the servers finish what they have.", flush=True)


def _run(running: ExitStack, arguments: argparse.Namespace, store: str, balancer: str, folder: Path) -> None:
    store_port = _free_port()
    password = secrets.token_urlsafe(24)
    configuration = folder / "store.conf"  # not on the command line, which others can read
    configuration.write_text(
        f'bind 127.0.0.1\nport {store_port}\nrequirepass {password}\ndir {folder}\nsave ""\nappendonly yes\nmaxmemory 1gb\n'
    )
    configuration.chmod(0o600)
    processes = {"store": running.enter_context(_started([store, str(configuration)], folder / "store.log"))}
    variables = {"SD_SHARED_STATE": f"redis://:{password}@127.0.0.1:{store_port}", "BENTOML_CONFIG": "configuration.yaml"}
    if "OMP_NUM_THREADS" not in os.environ:  # servers that all use all cores slow each other down many times
        variables["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // arguments.servers))
    _wait_for_port(store_port, processes, folder)
    ports = [_free_port() for _ in range(arguments.servers)]
    for number, port in enumerate(ports, 1):
        command = [sys.executable, "-m", "bentoml", "serve", "service:svc", "--production", "--host", "127.0.0.1", "--port", str(port)]
        log = folder / f"server-{number}.log"
        processes[f"server-{number}"] = running.enter_context(_started(command, log, ROOT / arguments.precision, variables))
    lines = "\n".join(f"  server server-{number} 127.0.0.1:{port} check inter 1s" for number, port in enumerate(ports, 1))
    (folder / "haproxy.cfg").write_text(_HAPROXY.format(port=arguments.port, servers=lines))
    for port in ports:
        _wait_until_ready(f"http://127.0.0.1:{port}", processes, folder)
    processes["haproxy"] = running.enter_context(_started([balancer, "-db", "-f", str(folder / "haproxy.cfg")], folder / "haproxy.log"))
    _wait_until_ready(f"http://127.0.0.1:{arguments.port}", processes, folder)
    print(f"HAProxy     http://127.0.0.1:{arguments.port}    page: http://127.0.0.1:{arguments.port}/ui")
    for number, port in enumerate(ports, 1):
        print(f"server-{number}    http://127.0.0.1:{port}    process {processes[f'server-{number}'].pid}    {folder}/server-{number}.log")
    print("Ctrl+C stops all of them.", flush=True)
    while True:
        time.sleep(_LOOK_S)
        if processes["store"].poll() is not None or processes["haproxy"].poll() is not None:
            raise SystemExit("The store or HAProxy has ended.")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _program(*names: str) -> str:
    """The first of these programs that is installed."""
    for name in names:
        if found := shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin"):
            return found
    raise SystemExit(f"{' or '.join(names)} is not installed (Debian: apt install redis-server haproxy)")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _started(
    command: Sequence[str], log: Path, folder: Path | None = None, variables: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program until the block ends: SIGTERM to it, and SIGKILL if that was not enough."""
    with log.open("wb") as output:
        # In a session of its own, so that Ctrl+C reaches it only through this process, once and in order.
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **(variables or {})}, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for_port(port: int, processes: Processes, folder: Path) -> None:
    for _ in _looks(processes, folder):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            continue


def _wait_until_ready(url: str, processes: Processes, folder: Path) -> None:
    for _ in _looks(processes, folder):
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            continue


def _looks(processes: Processes, folder: Path) -> Iterator[None]:
    """Again and again. Raises SystemExit when the time is over, or with the end of a process's log when that process has ended."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline:
        yield
        for name, process in processes.items():
            if process.poll() is not None:
                end = (folder / f"{name}.log").read_text(errors="replace").splitlines()[-20:]
                raise SystemExit("\n".join([f"{name} has ended with {process.returncode}:", *end]))
        time.sleep(_LOOK_S)
    raise SystemExit(f"not ready after {_READY_TIMEOUT_S} s")


if __name__ == "__main__":
    main()
