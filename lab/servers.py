# SPDX-License-Identifier: Apache-2.0
"""What runs on a backend: one nginx, and an echo server for UDP and long-lived TCP connections."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from shunt.lab.netns import Process
from shunt.lab.topology import Host
from shunt.lb.errors import ShuntError

HTTP_PORT, ECHO_PORT = 80, 7
BIG_BYTES = 256 * 1024

# One process, so that killing a backend kills all of it at once. Nothing is written outside the
# backend's own directory.
NGINX = """\
daemon off;
master_process off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/nginx-error.log warn;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    keepalive_timeout 3600s;
    keepalive_requests 1000000;
    client_max_body_size 0;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    default_type text/plain;
    server {{
        listen 0.0.0.0:{port} backlog=1024;
        listen [::]:{port} ipv6only=on backlog=1024;
        location / {{ return 200 "{name} $remote_addr\\n"; }}
        location /big {{ root {directory}/www; }}
    }}
}}
"""


class Servers:
    """The servers of one backend. HTTP: `/` is answered with `NAME PEER`, `/big` with 256 KiB."""

    def __init__(self, host: Host, directory: Path) -> None:
        self.host, self.directory = host, directory / host.role
        self.processes: list[Process] = []

    def start(self) -> None:
        """Start both servers; `wait_ready` says when they answer."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        www = self.directory / "www"
        www.mkdir(exist_ok=True)
        (www / "big").write_bytes(b"shunt\n" * (BIG_BYTES // 6 + 1))
        config = self.directory / "nginx.conf"
        config.write_text(
            NGINX.format(directory=self.directory, port=HTTP_PORT, name=self.host.role)
        )
        log = self.directory / "servers.log"
        error_log = str(self.directory / "nginx-error.log")
        nginx = ["nginx", "-p", str(self.directory), "-c", str(config), "-e", error_log]
        echo = [sys.executable, "-m", "shunt.lab.echo", self.host.role, str(ECHO_PORT)]
        self.processes = [self.host.namespace.start(argv, log) for argv in (nginx, echo)]

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Raises: ShuntError with the log's end if a server ended or does not answer in time."""
        deadline = time.monotonic() + timeout_s
        for port in (HTTP_PORT, ECHO_PORT):
            while not self._accepts(port):
                ended = [p for p in self.processes if not p.running]
                if ended or time.monotonic() > deadline:
                    raise ShuntError(
                        f"the servers of {self.host.role} are not ready on port {port}",
                        why=ended[0].log_tail() if ended else f"no answer in {timeout_s:g} s",
                        fix="see the log above; nginx must be installed",
                    )
                time.sleep(0.02)

    def _accepts(self, port: int) -> bool:
        with self.host.namespace.inside():
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        with sock:
            sock.settimeout(1)
            return sock.connect_ex((str(self.host.address4), port)) == 0

    def kill(self) -> None:
        """Kill them with -9: the kernel resets their connections and refuses new ones."""
        for process in self.processes:
            process.kill()

    def stop(self) -> None:
        for process in self.processes:
            process.stop()


@contextlib.contextmanager
def running(hosts: Sequence[Host], directory: Path) -> Iterator[dict[str, Servers]]:
    """Servers on all of these, ready, by role; stopped on leaving. More may be put in."""
    servers = {host.role: Servers(host, directory) for host in hosts}
    try:
        for one in servers.values():
            one.start()
        for one in servers.values():
            one.wait_ready()
        yield servers
    finally:
        for one in servers.values():
            one.stop()
