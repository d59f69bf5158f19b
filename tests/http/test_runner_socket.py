"""The way to the model process, which takes pickled Python objects: nobody but the server's user reaches it, and nothing over TCP."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from tests.http.servers import Server

pytestmark = pytest.mark.skipif(not Path("/proc/net/unix").exists(), reason="reads Linux's lists of sockets")

_LISTENING = "00010000"  # __SO_ACCEPTCON of <linux/net.h>, as /proc/net/unix has it


def processes(server: Server) -> dict[str, list[psutil.Process]]:
    """The server's processes by the module that they run."""
    named: dict[str, list[psutil.Process]] = {"runner": [], "http_api_server": []}
    for process in psutil.Process(server.process.pid).children(recursive=True):
        for name, found in named.items():
            if f"bentoml_cli.worker.{name}" in process.cmdline():
                found.append(process)
    return named


def inodes_of(process: psutil.Process) -> set[str]:
    links = [os.readlink(file) for file in Path(f"/proc/{process.pid}/fd").iterdir() if file.is_symlink()]
    return {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}


def listening_unix_sockets(inodes: set[str]) -> list[Path]:
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return [Path(line[7]) for line in lines if len(line) > 7 and line[6] in inodes and line[3] == _LISTENING]


def listening_tcp_ports(process: psutil.Process) -> set[int]:
    return {connection.laddr.port for connection in process.net_connections("tcp") if connection.status == psutil.CONN_LISTEN}


def test_the_runner_listens_on_one_unix_socket_in_a_folder_that_only_the_servers_user_may_enter(server: Server) -> None:
    (runner,) = processes(server)["runner"]
    (path,) = listening_unix_sockets(inodes_of(runner))
    folder = path.parent.stat()
    assert stat.S_IMODE(folder.st_mode) == 0o700
    assert folder.st_uid == os.getuid()
    assert stat.S_ISSOCK(path.stat().st_mode)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))  # it is that socket, and not one of the same name


def test_the_only_tcp_port_of_the_servers_workers_is_the_one_that_it_is_asked_at(server: Server) -> None:
    port = urlsplit(server.url).port
    for workers in processes(server).values():
        assert workers
        for worker in workers:
            # The runner inherits the listening socket too, and never accepts on it: what is asked there is answered as HTTP.
            assert listening_tcp_ports(worker) <= {port}


def test_the_supervisors_own_ports_are_at_loopback_addresses(server: Server) -> None:
    """BentoML has its supervisor, circus, take commands there, from everybody on the machine: docs/decisions.md says so."""
    supervisor = psutil.Process(server.process.pid)
    addresses = {connection.laddr for connection in supervisor.net_connections("tcp") if connection.status == psutil.CONN_LISTEN}
    assert {address.ip for address in addresses} == {"127.0.0.1"}
    assert len(addresses) == 3
