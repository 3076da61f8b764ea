# SPDX-License-Identifier: Apache-2.0
"""The programs of sockets attached, and asked by real sockets in a namespace of their own.

Without a daemon, so that every supported kernel shows it in a moment.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shunt.agent.socket_upkeep import words
from shunt.kern import cgroup, namespace
from shunt.kern.bpffs import ensure_bpffs
from shunt.kern.objects import Object, pin
from shunt.kern.ring import Ring
from shunt.lb.model import Port, Protocol, Settings
from shunt.sockops import attach
from shunt.sockops.attach import Sockets
from shunt.sockops.dry import DrySockets
from shunt.sockops.listing import Listing
from tests.netns.binding import bound
from tests.netns.own_vips import vip4, vip6
from tests.packets.balancer import TCP, UDP, Balancer, mapped
from tests.packets.private import in_namespace
from tests.packets.sockets import SockReason

V4, V6 = vip4(1), vip6(1)
GROUP = f"shunt-attach-{os.getpid()}"
BPFFS = Path(f"/sys/fs/bpf/shunt-attach-{os.getpid()}")


@contextlib.contextmanager
def covered(lb: Balancer, **settings: Any) -> Iterator[Sockets]:
    """Attached to the host's root of control groups, for sockets of this thread's namespace."""
    ensure_bpffs(BPFFS)
    BPFFS.mkdir(exist_ok=True)
    sockets = Sockets(BPFFS)
    try:
        sockets.follow(Settings(interfaces=(), **settings), lb.object.maps)
        assert sockets.attached()
        yield sockets
    finally:
        sockets.close()
        attach.cleanup(BPFFS)
        BPFFS.rmdir()


def here(function: Callable[[], None]) -> None:
    in_namespace(function)


def echo(kind: int = socket.SOCK_STREAM, family: int = socket.AF_INET) -> socket.socket:
    """A server's socket on loopback."""
    server = socket.socket(family, kind)
    server.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
    if kind == socket.SOCK_STREAM:
        server.listen(100)
    server.settimeout(10)
    return server


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def test_a_connection_is_translated_listed_and_freed(lb: Balancer, family: int) -> None:
    vip, backend = (V4, "127.0.0.1") if family == socket.AF_INET else (V6, "::1")

    def run() -> None:
        with echo(family=family) as server, covered(lb) as sockets:
            port = server.getsockname()[1]
            service = lb.add_service(vip, backends=[backend], backend_port=port)
            listing = Listing()
            with socket.socket(family) as client, contextlib.closing(listing):
                assert len(listing.rows(sockets.maps)) == 0
                client.connect((vip, 80))
                taken, peer = server.accept()
                taken.close()
                assert (client.getpeername()[0], peer) == (vip, client.getsockname())
                (row,) = listing.rows(sockets.maps)
                assert int(row["netns"]) == namespace.cookie()
                assert int(row["inode"]) == os.fstat(client.fileno()).st_ino
                assert int(row["own_port"]) == client.getsockname()[1]
                assert (int(row["port"]), int(row["vip_port"])) == (port, 80)
                assert int(row["backend"]) == service.backends[0]
                assert (int(row["proto"]), int(row["ipv6"])) == (6, family == socket.AF_INET6)
                assert int(row["uid"]) == os.geteuid()
                client.close()
                # The kernel frees it with the socket: when the last segment has come.
                deadline = time.monotonic() + 10
                while len(listing.rows(sockets.maps)):
                    assert time.monotonic() < deadline
                    time.sleep(0.01)

    here(run)


def test_a_socket_of_ipv6_alone_gets_backends_of_ipv6(lb: Balancer) -> None:
    def connect(only: int) -> int:
        with socket.socket(socket.AF_INET6) as client:
            client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
            return client.connect_ex((V6, 80))

    def run() -> None:
        with echo(family=socket.AF_INET6) as server, covered(lb):
            port = server.getsockname()[1]  # nobody listens on IPv4's
            lb.add_service(V6, backends=["127.0.0.1", "::1"], backend_port=port)
            assert {connect(0) for _ in range(40)} == {0, errno.ECONNREFUSED}
            assert {connect(1) for _ in range(40)} == {0}

    here(run)


def test_datagrams(lb: Balancer) -> None:
    def run() -> None:
        with echo(socket.SOCK_DGRAM) as server, covered(lb) as sockets:
            port = server.getsockname()[1]
            lb.add_service(V4, 53, UDP, backends=["127.0.0.1"], backend_port=port)
            listing = Listing()
            with echo(socket.SOCK_DGRAM) as client, contextlib.closing(listing):
                client.sendto(b"who", (V4, 53))
                data, peer = server.recvfrom(99)
                server.sendto(data, peer)
                assert client.recvfrom(99) == (b"who", (V4, 53))
                (row,) = listing.rows(sockets.maps)
                assert (int(row["connected"]), int(row["proto"])) == (0, UDP)

    here(run)


def bind(address: str, port: int, proto: int = TCP, *, only: bool = False) -> int:
    """As bound(), of a socket of its own."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_STREAM if proto == TCP else socket.SOCK_DGRAM
    with socket.socket(family, kind) as sock:
        return bound(sock, address, port, only=only)


def test_node_ports(lb: Balancer) -> None:
    lb.add_service("127.0.0.1", 30080).ask(node=True)
    lb.add_service("127.0.0.3", 30080)  # a VIP that is named
    told: list[bytes] = []

    def run() -> None:
        with covered(lb) as sockets:
            ring = Ring(sockets.maps["sock_refused"].fd, told.append)
            with contextlib.closing(ring):
                assert bind("0.0.0.0", 30080) == 0
                sockets.reserve(words({(4, Port(30080, Protocol.TCP))}))
                for address in ("0.0.0.0", "127.0.0.1", "::", "::ffff:127.0.0.1"):
                    assert bind(address, 30080) == errno.EADDRINUSE, address
                for address in ("127.0.0.2", "127.0.0.3", "::1"):
                    assert bind(address, 30080) == 0, address
                assert bind("0.0.0.0", 30081) == bind("::", 30080, only=True) == 0
                assert ring.consume() == 4
                records = np.frombuffer(b"".join(told), sockets.btf.struct("bind_refused"))
                assert {int(r["port"]) for r in records} == {30080}
                assert {int(r["pid"]) for r in records} == {os.getpid()}
                assert [any(r["addr"]) for r in records] == [False, True, False, True]
                assert sockets.reasons()["REFUSED_NODE_PORT"] == 4
                for _ in range(500):
                    assert bind("0.0.0.0", 30080) == errno.EADDRINUSE
                assert 0 < ring.consume() < 80, "what a page holds"
                assert sockets.reasons()["REFUSED_NODE_PORT"] == 504
                sockets.reserve(words(set()))
                assert bind("0.0.0.0", 30080) == 0

    here(run)


AT = {"tcp4": ("127.0.0.1", 30080, 6), "tcp6": ("::1", 30081, 6), "udp4": ("127.0.0.1", 30082, 17),
      "udp6": ("::1", 30083, 17)}  # fmt: skip
ENDS = (
    "0.0.0.0",
    "::",
    "::ffff:0.0.0.0",
    "127.0.0.1",
    "::1",
    "::ffff:127.0.0.1",
    "127.0.0.2",
    "127.0.0.3",
)


def test_the_dry_bind_ends_as_a_real_one(lb: Balancer) -> None:
    """Each address, port, protocol, and IPV6_V6ONLY; the kernel itself minds none but those with
    IPV6_V6ONLY and an address of IPv4, after the programs."""
    for vip, port, proto in AT.values():
        lb.add_service(vip, port, proto).ask(node=True)
        lb.add_service("127.0.0.3", port, proto)

    def run() -> None:
        ends = Counter[bool]()
        with covered(lb) as sockets, contextlib.ExitStack() as stack:
            ports = {(ip_address(a).version, Port(p, Protocol(q))) for a, p, q in AT.values()}
            sockets.reserve(words(ports))
            own = namespace.cookie()
            dry = DrySockets(lb.object.maps, sockets.maps, excludes=False, netns=own)
            stack.callback(dry.close)
            for address, port, proto in itertools.product(
                ENDS, (0, 30079, *(p for _, p, _ in AT.values())), (TCP, UDP)
            ):
                for only in (False, True) if ":" in address else (False,):
                    asked = {"addr": mapped(address), "port": port, "proto": proto}
                    reason, _ = dry.bind(netns=own, ipv6_only=only, **asked)
                    refused = reason == SockReason.REFUSED_NODE_PORT
                    invalid = only and address.startswith("::ffff:")
                    want = errno.EADDRINUSE if refused else errno.EINVAL if invalid else 0
                    assert bind(address, port, proto, only=only) == want, (address, port, only)
                    ends[refused] += 1
            counted = sockets.reasons()
            assert counted["REFUSED_NODE_PORT"] == ends[True] > 20 < ends[False]

    here(run)


CODE = """
import os, socket, sys
group, vip = sys.argv[1:]
open(group + "/cgroup.procs", "w").write(str(os.getpid()))
sys.exit(socket.socket().connect_ex((vip, 80)))
"""


def test_an_excluded_control_group(lb: Balancer) -> None:
    root = cgroup.root()
    deep = Path(GROUP, *"abcdefgh")
    made = [root / GROUP, *(root / each for each in reversed(deep.parents[:-2])), root / deep]

    def run() -> None:
        with echo() as server, covered(lb, sockets_exclude=(f"/{GROUP}",)) as sockets:
            lb.add_service(V4, backends=["127.0.0.1"], backend_port=server.getsockname()[1])
            assert sockets.excluded == {f"/{GROUP}": 0}
            made[0].mkdir()
            sockets.look_at_groups()
            assert sockets.excluded[f"/{GROUP}"] == cgroup.identity(made[0])
            (root / deep).mkdir(parents=True)
            results = [
                subprocess.run([sys.executable, "-c", CODE, str(group), V4]).returncode
                for group in (root, made[0], root / deep)
            ]
            assert results == [0, errno.ENETUNREACH, errno.ENETUNREACH]
            assert sockets.reasons()["PASS_CGROUP"] == 2

    try:
        here(run)
    finally:
        for each in [root / deep, *(root / deep).parents]:
            if each.is_relative_to(root / GROUP) and each.exists():
                each.rmdir()
    assert not (root / GROUP).exists()


def test_counts_of_a_version_with_other_reasons_begin_anew(lb: Balancer) -> None:
    """What sockets keep is not given up for it."""
    ensure_bpffs(BPFFS)
    maps = BPFFS / "sockets/maps"
    maps.mkdir(parents=True)
    with Object(attach.OBJECT) as older:
        older.set_entries({attach.COUNTS: 3})
        older.keep_programs()
        older.load()
        for name in (attach.COUNTS, "sock_peers"):
            pin(older.maps[name].fd, maps / name)

        def run() -> None:
            with covered(lb) as sockets:
                assert len(sockets.reasons()) > 3
                assert sockets.maps["sock_peers"].spec == older.maps["sock_peers"].spec

        here(run)


def test_a_map_of_another_shape_is_still_refused(lb: Balancer) -> None:
    from shunt.lb.errors import ShuntError

    ensure_bpffs(BPFFS)
    maps = BPFFS / "sockets/maps"
    maps.mkdir(parents=True)
    with Object(attach.OBJECT) as older:
        older.set_entries({"sock_clients": 3})
        older.keep_programs()
        older.load()
        pin(older.maps["sock_clients"].fd, maps / "sock_clients")

        def run() -> None:
            with pytest.raises(ShuntError, match="sock_clients"), covered(lb):
                pass

        here(run)
