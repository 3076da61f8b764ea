# SPDX-License-Identifier: Apache-2.0
"""Of a socket that is closed nothing is left of what Shunt kept for it, in no map and in no memory.

That is why no program is attached to `sock_release`. Without a daemon, so that every supported
kernel shows it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from shunt.kern import cgroup, libbpf
from shunt.kern.maps import Map
from shunt.sockops.attach import Sockets
from shunt.sockops.listing import Listing
from shunt.sockops.streams import Streams
from tests.netns.own_vips import vip4, vip6
from tests.packets.balancer import TCP, UDP, Balancer, S
from tests.packets.private import in_namespace
from tests.packets.test_socket_attach import BPFFS, covered, echo

V4, V6, CLOSED = vip4(2), vip6(2), vip4(3)
AT_ONCE, ROUNDS = 400, 25
# Less than what is kept with a tenth of them; the kernel's own caches come and go by some pages.
NOISE_BYTES = 256 << 10
# SO_LINGER: no TIME_WAIT, which is no socket and takes memory.
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@contextlib.contextmanager
def memory_group() -> Iterator[Path]:
    """What the kernel takes for this process is counted apart: the file that has the count."""
    unified = cgroup.root()
    v2 = "memory" in (unified / "cgroup.controllers").read_text().split()
    lines = [x.split(":", 2) for x in Path("/proc/self/cgroup").read_text().splitlines()]
    if v2:
        (unified / "cgroup.subtree_control").write_text("+memory")
        root, home = unified, next(path for number, _, path in lines if number == "0")
    else:
        root = Path("/sys/fs/cgroup/memory")
        home = next(path for _, kind, path in lines if kind == "memory")
    group = root / f"shunt-freed-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield group / ("memory.stat" if v2 else "memory.kmem.usage_in_bytes")
    finally:
        (root / home.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def kernel_bytes(counted: Path) -> int:
    words = counted.read_text().split()
    return int(words[words.index("kernel") + 1] if "kernel" in words else words[0])


def until(condition: Callable[[], bool], what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)


def keys(m: Map) -> int:
    """Elements of a hash, also of sockets; LRUs have no other way to tell on every kernel."""
    key, n = np.zeros(m.spec.key.itemsize, np.uint8), 0
    at = None
    with contextlib.suppress(FileNotFoundError):
        while True:
            libbpf.call("bpf_map_get_next_key", m.fd, at, key.ctypes.data)
            at, n = key.ctypes.data, n + 1
    return n


def connections(server: socket.socket, vip: str, n: int) -> list[socket.socket]:
    """Both ends of each."""
    ends = []
    for _ in range(n):
        client = socket.socket(server.family)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        client.connect((vip, 80))
        ends += [client, server.accept()[0]]
    return ends


def datagrams(
    server: socket.socket, vip: str, n: int, *, connected: bool = False
) -> list[socket.socket]:
    made = []
    for _ in range(n):
        client = socket.socket(server.family, socket.SOCK_DGRAM)
        made.append(client)
        if connected:
            client.connect((vip, 80))
            client.send(b"")
        else:
            client.sendto(b"", (vip, 80))
        server.recv(1)
    return made


def connected_datagrams(server: socket.socket, vip: str, n: int) -> list[socket.socket]:
    return datagrams(server, vip, n, connected=True)


def close(ends: Sequence[socket.socket]) -> None:
    for sock in ends:
        sock.close()


Make = Callable[[socket.socket, str, int], list[socket.socket]]


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("make", [connections, connected_datagrams, datagrams])
def test_nothing_is_left_of_thousands(lb: Balancer, make: Make, family: int) -> None:
    vip, backend = (V4, "127.0.0.1") if family == socket.AF_INET else (V6, "::1")
    kind = socket.SOCK_STREAM if make is connections else socket.SOCK_DGRAM

    def run() -> None:
        with memory_group() as counted, echo(kind, family) as server, covered(lb) as sockets:
            proto, port = TCP if kind == socket.SOCK_STREAM else UDP, server.getsockname()[1]
            service = lb.add_service(vip, 80, proto, backends=[backend], backend_port=port)
            service.ask(affinity_ns=1000 * S)
            with contextlib.closing(Listing()) as listing:
                rounds(lambda: make(server, vip, AT_ONCE), listing, sockets, counted)
            assert keys(sockets.maps["sock_clients"]) == 1, "one namespace is one client"
            assert not keys(sockets.maps["sock_excluded"])

    in_namespace(run)


def rounds(
    make: Callable[[], list[socket.socket]], listing: Listing, sockets: Sockets, counted: Path
) -> None:
    """Open and close them, again and again; the first time is for what the kernel keeps ready."""

    def listed() -> int:
        return len(listing.rows(sockets.maps))

    def once() -> int:
        """The memory while they are open."""
        ends = make()
        assert listed() == AT_ONCE
        taken = kernel_bytes(counted)
        close(ends)
        until(lambda: not listed(), listed)
        return taken

    once()
    base = settled(counted)
    assert once() - base > 2 * NOISE_BYTES, "what is open is seen in memory"
    for _ in range(ROUNDS):
        once()

    def grown() -> int:
        return kernel_bytes(counted) - base

    until(lambda: grown() < NOISE_BYTES, lambda: f"{grown()} bytes are left")


def settled(counted: Path) -> int:
    """The lowest that it comes to: memory is given back a moment after it is not used any more."""
    lowest, since = kernel_bytes(counted), time.monotonic()
    while time.monotonic() - since < 0.5:
        time.sleep(0.02)
        if (now := kernel_bytes(counted)) < lowest:
            lowest, since = now, time.monotonic()
    return lowest


def opened(maps: Mapping[str, Map]) -> dict[str, int]:
    """What streams keep of connections."""
    return {name: keys(maps[name]) for name in ("sock_ends", "stream_pairs", "stream_dials")}


NONE = {"sock_ends": 0, "stream_pairs": 0, "stream_dials": 0}


def test_nothing_is_left_of_streams(lb: Balancer) -> None:
    """Ends of redirected connections, which have had their four messages each: they pay."""

    def run() -> None:
        with echo() as server, covered(lb) as sockets, contextlib.ExitStack() as stack:
            port = server.getsockname()[1]
            service = lb.add_service(V4, backends=["127.0.0.1"], backend_port=port)
            streams = Streams(BPFFS)
            stack.callback(streams.stop)
            streams.follow({service.id}, lb.object.maps, sockets.peers(), anew=True)
            listing = stack.enter_context(contextlib.closing(Listing()))
            for n in range(1, 6):
                ends = connections(server, V4, AT_ONCE)
                for client, taken in zip(ends[::2], ends[1::2], strict=True):
                    for one, other in 4 * [(client, taken), (taken, client)]:
                        one.send(b"hello")
                        assert other.recv(9) == b"hello"
                assert streams.live() == {"redirected": AT_ONCE, "tcp": 0}
                assert len(listing.ends(streams.maps)) == 2 * AT_ONCE
                assert opened(streams.maps) == {
                    "sock_ends": 2 * AT_ONCE, "stream_pairs": AT_ONCE, "stream_dials": 0,
                }  # fmt: skip
                close(ends)
                until(lambda: opened(streams.maps) == NONE, lambda: opened(streams.maps))
                until(lambda: not len(listing.ends(streams.maps)), lambda: "ends are left")
                assert len(listing.rows(sockets.maps)) == 0
                assert streams.events()["PAIRED"][0] == n * AT_ONCE
            assert keys(streams.maps["stream_payers"]) == 1, "this process"

    in_namespace(run)


def test_attempts_that_fail_make_room_for_each_other(lb: Balancer) -> None:
    """No program sees them end, and the kernel has no storage for who is not open yet: of services
    with `redirect` the newest stand in an LRU, whose memory is there from the start."""

    def run() -> None:
        with echo() as server, covered(lb) as sockets, contextlib.ExitStack() as stack:
            server_port, nobody = server.getsockname()[1], 9
            services = [
                lb.add_service(vip, backends=["127.0.0.1"], backend_port=port)
                for vip, port in ((V4, server_port), (CLOSED, nobody))
            ]
            streams = Streams(BPFFS)
            stack.callback(streams.stop)
            streams.follow({s.id for s in services}, lb.object.maps, sockets.peers(), anew=True)
            listing = stack.enter_context(contextlib.closing(Listing()))
            dials = streams.maps["stream_dials"].spec.entries
            for port in range(10000, 10000 + dials + dials // 4):
                with socket.socket() as client:
                    client.bind(("127.0.0.1", port))
                    assert client.connect_ex((CLOSED, 80)) == errno.ECONNREFUSED
            assert dials // 2 < opened(streams.maps)["stream_dials"] <= dials
            until(lambda: not len(listing.rows(sockets.maps)), lambda: "sockets are left")
            assert not len(listing.ends(streams.maps))
            ends = connections(server, V4, 10)
            assert streams.live() == {"redirected": 10, "tcp": 0}
            close(ends)

    in_namespace(run)
