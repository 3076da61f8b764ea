# SPDX-License-Identifier: Apache-2.0
"""Programs that nobody here wrote, run in a namespace of socket_node.py and asking for its VIPs.

Each function runs one to its end and says who answered; what it must have seen of the VIP is
asserted here. Proxies and forwarders are started once, by `Proxies`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from shunt.lab.netns import Namespace, Process

NGINX_PORT, HAPROXY_PORT, DNS_PORT = {4: 8180, 6: 8186}, {4: 8280, 6: 8286}, {4: 5304, 6: 5306}
VIP = {4: "203.0.113.1", 6: "2001:db8::1"}
_IPERF3 = threading.Lock()  # its server serves one at a time
BIG = b"shunt\n" * (256 * 1024 // 6 + 1)  # /big of lab/servers.py

NGINX = """\
daemon off;
pid {directory}/nginx.pid;
worker_processes 1;
error_log {directory}/nginx-error.log warn;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    upstream four {{ server 203.0.113.1:80; keepalive 4; }}
    upstream six {{ server [2001:db8::1]:80; keepalive 4; }}
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    server {{ listen 127.0.0.1:8180 reuseport; location / {{ proxy_pass http://four; }} }}
    server {{ listen 127.0.0.1:8186 reuseport; location / {{ proxy_pass http://six; }} }}
}}
"""

# Every byte by way of a pipe, in both directions, if the kernel lets it.
HAPROXY = """\
global
    maxconn 1000
    maxpipes 64
    stats socket {directory}/haproxy.sock mode 600 level admin
defaults
    mode tcp
    timeout connect 5s
    timeout client 10s
    timeout server 10s
    {splice} splice-request
    {splice} splice-response
listen four
    bind 127.0.0.1:8280
    server vip 203.0.113.1:80 check inter 500ms
listen six
    bind 127.0.0.1:8286
    server vip [2001:db8::1]:80 check inter 500ms
"""


class Proxies:
    """nginx, HAProxy and two dnsmasq in one namespace, each with a VIP behind it."""

    def __init__(self, space: Namespace, directory: Path, *, splice: bool = True) -> None:
        self.space, self.splice = space, splice
        self.directory = directory / f"proxies-{space.name}"
        self.directory.mkdir(mode=0o755)
        self.running: list[Process] = []

    @property
    def log(self) -> Path:
        return self.directory / "log"

    def start(self) -> None:
        """Start them, and wait until HTTP is answered."""
        d = self.directory
        (d / "nginx.conf").write_text(NGINX.format(directory=d))
        splice = "option" if self.splice else "no option"
        (d / "haproxy.cfg").write_text(HAPROXY.format(directory=d, splice=splice))
        argvs = [
            ["nginx", "-p", str(d), "-c", str(d / "nginx.conf"), "-e", str(d / "nginx-error.log")],
            ["haproxy", "-W", "-db", "-f", str(d / "haproxy.cfg")],
            *(
                [
                    *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file="),
                    *("--no-resolv", "--no-hosts", "--user=root", "--cache-size=0", "--no-daemon"),
                    *(f"--port={DNS_PORT[ip]}", "--listen-address=127.0.0.1", "--bind-interfaces"),
                    f"--server={VIP[ip]}",
                ]
                for ip in (4, 6)
            ),
        ]
        self.running = [self.space.start(argv, self.log) for argv in argvs]
        deadline = time.monotonic() + 20
        for port in (*NGINX_PORT.values(), *HAPROXY_PORT.values()):
            while self.space.run("curl", "-sf", local(port), check=False).returncode:
                assert all(p.running for p in self.running), self.log.read_text()[-2000:]
                assert time.monotonic() < deadline, self.log.read_text()[-2000:]
                time.sleep(0.1)

    def stop(self) -> None:
        for process in reversed(self.running):
            process.stop()

    def haproxy(self, command: str) -> dict[str, str]:
        """What its statistics say."""
        script = (
            "import socket, sys\n"
            "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
            "s.sendall(sys.argv[2].encode() + b'\\n'); print(s.makefile().read())\n"
        )
        shown = self.space.run("python3", "-c", script, str(self.directory / "haproxy.sock"),
                               command).stdout  # fmt: skip
        return dict(line.split(": ", 1) for line in shown.splitlines() if ": " in line)


def local(port: int, path: str = "") -> str:
    return f"http://127.0.0.1:{port}/{path}"


def bracketed(ip: int) -> str:
    return f"[{VIP[6]}]" if ip == 6 else VIP[4]


def curl(space: Namespace, ip: int) -> set[str]:
    """It asks the socket for its peer (getpeername) and says that."""
    urls = [f"http://{bracketed(ip)}/{n}" for n in range(2)]
    words = space.run("curl", "-sS", "-m", "5", "-w", "%{remote_ip} ", *urls).stdout.split()
    assert words.count(VIP[ip]) == 2, words
    return {word for word in words if word.startswith("be")}


def wget(space: Namespace, ip: int) -> set[str]:
    shown = space.run("wget", "-qO-", "-T5", "-t1", f"http://{bracketed(ip)}/").stdout
    return {shown.split()[0]}


def nginx(space: Namespace, ip: int) -> set[str]:
    """As a proxy that keeps connections to its upstream."""
    return {space.run("curl", "-sSf", "-m", "5", local(NGINX_PORT[ip])).stdout.split()[0]}


def haproxy(space: Namespace, ip: int) -> set[str]:
    """By splice(): all of the bytes, in order."""
    path = Path(f"/tmp/shunt-{space.name}-{ip}")
    try:
        space.run("curl", "-sSf", "-m", "10", "-o", str(path), local(HAPROXY_PORT[ip], "big"))
        assert path.read_bytes() == BIG
    finally:
        path.unlink(missing_ok=True)
    return {space.run("curl", "-sSf", "-m", "5", local(HAPROXY_PORT[ip])).stdout.split()[0]}


def dig(space: Namespace, ip: int) -> set[str]:
    """It says from where the answer came, and takes none from elsewhere."""
    found = set()
    for more in ((), ("+tcp",)) if ip == 4 else ((),):
        shown = space.run("dig", f"@{VIP[ip]}", "+tries=1", "+time=5", *more,
                          "who.example", "TXT").stdout  # fmt: skip
        assert f";; SERVER: {VIP[ip]}#53({VIP[ip]})" in shown, shown
        assert "unexpected source" not in shown
        found |= {line.split('"')[1] for line in shown.splitlines() if 'TXT\t"' in line}
    return found


def kdig(space: Namespace, ip: int) -> set[str]:
    """Asks the socket for its peer as well."""
    shown = space.run("kdig", f"@{VIP[ip]}", "+retry=0", "+time=5", "who.example", "TXT").stdout
    assert f"From {VIP[ip]}@53(UDP)" in shown, shown
    return {line.split('"')[1] for line in shown.splitlines() if 'TXT\t"' in line}


def dnsmasq(space: Namespace, ip: int) -> set[str]:
    """As a forwarder: it drops answers from anybody but its server, from a socket that is not
    connected."""
    shown = space.run("dig", "@127.0.0.1", "-p", str(DNS_PORT[ip]), "+tries=1", "+time=5", "+short",
                      "who.example", "TXT").stdout  # fmt: skip
    return {shown.strip().strip('"')}


def libc_resolver(space: Namespace, ip: int) -> set[str]:
    """getaddrinfo(): both questions by one sendmmsg() on a connected socket."""
    config = Path(f"/tmp/shunt-{space.name}-resolv-{ip}")
    config.write_text(f"nameserver {VIP[ip]}\noptions timeout:5 attempts:1\n")
    try:
        script = 'mount --bind "$1" /etc/resolv.conf; exec getent -s hosts:dns ahosts host.example'
        shown = space.run("unshare", "--mount", "sh", "-ec", script, "sh", str(config)).stdout
    finally:
        config.unlink()
    assert {line.split()[0] for line in shown.splitlines()} == {"192.0.2.1", "2001:db8:5::1"}
    return set()


ASYNCIO = """\
import asyncio, socket, sys
vip = sys.argv[1]

class Asks(asyncio.DatagramProtocol):
    def __init__(self, to):
        self.to, self.answer = to, asyncio.get_running_loop().create_future()
    def connection_made(self, transport):
        transport.sendto(b"hello", self.to)
    def datagram_received(self, data, peer):
        self.answer.set_result((data.decode().split()[0], peer[:2]))
    def error_received(self, error):
        self.answer.set_exception(error)

async def ask():
    loop = asyncio.get_running_loop()
    reader, writer = await asyncio.open_connection(vip, 7)
    assert writer.get_extra_info("peername")[:2] == (vip, 7)
    writer.write(b"hello\\n")
    print((await reader.readline()).decode().split()[0])
    writer.close()
    await writer.wait_closed()
    family = socket.AF_INET6 if ":" in vip else socket.AF_INET
    for to, how in ((None, {"remote_addr": (vip, 7)}), ((vip, 7), {"family": family})):
        transport, asks = await loop.create_datagram_endpoint(lambda: Asks(to), **how)
        name, peer = await asks.answer
        assert peer == (vip, 7), peer
        assert to or transport.get_extra_info("peername")[:2] == (vip, 7)
        print(name)
        transport.close()

asyncio.run(asyncio.wait_for(ask(), 10))
"""


def asyncio(space: Namespace, ip: int) -> set[str]:
    """A stream, and datagram endpoints with and without a remote address."""
    return set(space.run(system_python(), "-c", ASYNCIO, VIP[ip]).stdout.split())


QUIC = """\
import asyncio, ssl, sys
from aioquic.asyncio.client import connect
from aioquic.quic.configuration import QuicConfiguration

async def ask():
    configuration = QuicConfiguration(
        is_client=True, alpn_protocols=["shunt-test"], verify_mode=ssl.CERT_NONE
    )
    async with connect(sys.argv[1], 443, configuration=configuration) as connection:
        for _ in range(3):
            reader, writer = await connection.create_stream()
            writer.write_eof()
            print("be" + (await reader.read()).decode()[-1])
        await connection.ping()

asyncio.run(asyncio.wait_for(ask(), 10))
"""


def quic(space: Namespace, ip: int) -> set[str]:
    """aioquic sends from a socket that is not connected, of IPv6 for both families."""
    answers = space.run(sys.executable, "-c", QUIC, VIP[ip]).stdout.split()
    assert len(set(answers)) == 1 < len(answers), "one connection, one server"
    return set(answers)


def iperf3(space: Namespace, ip: int) -> set[str]:
    """It tells the peer of each connection (getpeername); those of UDP, too."""
    vip = {4: "203.0.113.40", 6: "2001:db8::40"}[ip]
    with _IPERF3:
        return _iperf3(space, vip)


def _iperf3(space: Namespace, vip: str) -> set[str]:
    for more in ((), ("--udp", "--bitrate", "5M", "--length", "1000")):
        argv = ("iperf3", "--client", vip, "--time", "1", "--json", "--parallel", "2", *more)
        for _ in range(50):  # it is still busy with the one before, for a moment
            shown = json.loads(space.run(*argv, check=False).stdout)
            if "busy" not in shown.get("error", ""):
                break
            time.sleep(0.1)
        assert "error" not in shown, shown["error"]
        assert {c["remote_host"] for c in shown["start"]["connected"]} == {vip}
        assert shown["start"]["connecting_to"]["host"] == vip
        assert shown["end"]["sum" if more else "sum_received"]["bytes"] > 100_000
    return set()


def system_python() -> str:
    found = shutil.which("python3", path=os.defpath)
    assert found is not None
    return found


PROGRAMS: dict[str, Callable[[Namespace, int], set[str]]] = {
    each.__name__: each
    for each in (
        *(curl, wget, nginx, haproxy, dig, kdig, dnsmasq, libc_resolver, asyncio, quic, iperf3),
    )
}
