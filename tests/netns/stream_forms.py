# SPDX-License-Identifier: Apache-2.0
"""Connections between two sockets of this kernel, redirected in one of two forms.

`Plain` is plain_streams.bpf.c, for sockets of a control group of its own, on a namespace's loopback
addresses.
`Guarded` is a node (socket_node.py) with services that have `redirect: on`; the servers are in the
namespace of a backend.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from shunt.kern import cgroup, links
from shunt.kern.maps import Map
from shunt.kern.objects import Object
from shunt.lab.netns import Namespace
from tests.netns.own_vips import vip4, vip6
from tests.netns.socket_node import BE1, SIX1, Node, a_node

PLAIN = Path(__file__).with_name("plain_streams.bpf.o")
VIP, VIP6, LEFT_VIP = vip4(20), vip6(20), vip4(21)
SERVICES: dict[str, dict[str, Any]] = {
    "redirected": {"vip": VIP, "ports": ["any"], "backends": [BE1], "redirect": "on"},
    "redirected-six": {"vip": VIP6, "ports": ["any"], "backends": [SIX1], "redirect": "on"},
    "not-redirected": {"vip": LEFT_VIP, "ports": ["any"], "backends": [BE1]},
}
BOTH_ENDS = 5  # seconds that anything may take


class Form(Protocol):
    """Where the two ends of a connection are, and how they come to be."""

    client_space: Namespace
    server_space: Namespace

    def listen(self, *options: tuple[int, int, int], port: int = 0) -> socket.socket: ...

    def dial(self, listener: socket.socket, *options: tuple[int, int, int]) -> socket.socket: ...

    def undialled(self) -> socket.socket: ...


@contextlib.contextmanager
def pair(
    form: Form,
    *options: tuple[int, int, int],
    server_options: tuple[tuple[int, int, int], ...] = (),
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connected client and its server. The options are set before they connect."""
    with form.listen(*server_options) as listener, form.dial(listener, *options) as client:
        server = listener.accept()[0]
        server.settimeout(BOTH_ENDS)
        with server:
            yield client, server


def made(space: Namespace, family: int, options: tuple[tuple[int, int, int], ...]) -> socket.socket:
    with space.inside():
        sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(BOTH_ENDS)
    for option in options:
        sock.setsockopt(*option)
    return sock


def listening(
    space: Namespace, address: str, port: int, options: tuple[tuple[int, int, int], ...]
) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    reuse = (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock = made(space, family, (reuse, *options))
    sock.bind((address, port))
    sock.listen(1024)
    return sock


class Plain:
    """The form without guards."""

    def __init__(self, space: Namespace, other: Namespace, group: Path, obj: Object) -> None:
        self.client_space = self.server_space = space
        self.other, self.group = other, group
        self.ends: Map = obj.maps["plain_ends"]

    @contextlib.contextmanager
    def covered(self) -> Iterator[None]:
        """Sockets that this process makes meanwhile are redirected."""
        before = Path("/proc/self/cgroup").read_text().splitlines()
        home = cgroup.root() / next(x for x in before if x.startswith("0::"))[4:]
        (self.group / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (home / "cgroup.procs").write_text(str(os.getpid()))

    def listen(
        self, *options: tuple[int, int, int], port: int = 0, space: Namespace | None = None
    ) -> socket.socket:
        with self.covered():
            return listening(space or self.server_space, "127.0.0.1", port, options)

    def dial(
        self,
        listener: socket.socket,
        *options: tuple[int, int, int],
        port: int = 0,
        space: Namespace | None = None,
    ) -> socket.socket:
        with self.covered():
            sock = made(space or self.client_space, socket.AF_INET, options)
        if port:
            sock.bind(("127.0.0.1", port))
        sock.connect(listener.getsockname())
        return sock

    def undialled(self) -> socket.socket:
        with self.covered():
            return made(self.client_space, socket.AF_INET, ())

    def key(self, sock: socket.socket) -> np.ndarray[Any, Any]:
        """Of a socket's entry."""
        (local, local_port), (remote, remote_port) = sock.getsockname(), sock.getpeername()
        addresses = socket.inet_aton(local) + socket.inet_aton(remote)
        raw = addresses + struct.pack("=II", local_port, remote_port)
        return np.frombuffer(raw, self.ends.spec.key)


@contextlib.contextmanager
def plain() -> Iterator[Plain]:
    with contextlib.ExitStack() as stack:
        spaces = []
        for role in ("one", "two"):
            spaces.append(Namespace.create(f"shunt-plain-{os.getpid()}-{role}"))
            stack.callback(spaces[-1].delete)
            spaces[-1].sysctl({"ipv4.tcp_fastopen": 0x207})
        group = cgroup.root() / f"shunt-plain-{os.getpid()}"
        group.mkdir()
        stack.callback(group.rmdir)
        obj = stack.enter_context(Object(PLAIN))
        obj.load()
        links.attach_verdict(obj.programs["plain_stream"].fd, obj.maps["plain_ends"].fd)
        held = os.open(group, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, held)
        program = "plain_streams"
        link = links.attach_cgroup(obj.programs[program].fd, held, obj.attach_type(program))
        stack.callback(os.close, link)
        yield Plain(spaces[0], spaces[1], group, obj)


class Guarded:
    """The form that Shunt has."""

    def __init__(self, node: Node, vip: str = VIP, address: str = BE1) -> None:
        self.node, self.vip, self.address = node, vip, address
        self.client_space = node.here
        self.server_space = node.spaces["be1"]

    def listen(self, *options: tuple[int, int, int], port: int = 0) -> socket.socket:
        return listening(self.server_space, self.address, port, options)

    def forget_this_client(self) -> None:
        """What this process's connections carried before: its next ones are worth being paired."""
        with contextlib.suppress(FileNotFoundError):  # there while a service is redirected
            payers = Map.pinned(self.node.bpffs / "streams/maps/stream_payers")
            payers.delete(os.getpid())
            payers.close()

    def dial(self, listener: socket.socket, *options: tuple[int, int, int]) -> socket.socket:
        self.forget_this_client()
        family = socket.AF_INET6 if ":" in self.vip else socket.AF_INET
        sock = made(self.client_space, family, options)
        sock.connect((self.vip, listener.getsockname()[1]))
        return sock

    def undialled(self) -> socket.socket:
        self.forget_this_client()
        return made(self.client_space, socket.AF_INET6 if ":" in self.vip else socket.AF_INET, ())

    def status(self) -> Any:
        """Whatever may be wrong elsewhere: a neighbour that does not answer yet, say."""
        return self.node.shunt("status", "-o", "json").json

    def events(self) -> dict[str, int]:
        """What became of connections and messages, so far."""
        found: dict[str, int] = self.status()["sockets"]["streams"]["events"]
        return found

    @contextlib.contextmanager
    def counted(self) -> Iterator[dict[str, int]]:
        """How often each event came meanwhile; filled at the end."""
        self.forget_this_client()
        before, more = self.events(), dict[str, int]()
        yield more
        after = self.events()
        more.update((k, n) for k in after if (n := after[k] - before.get(k, 0)))


@contextlib.contextmanager
def guarded(name: str, *, serving: bool = False) -> Iterator[Guarded]:
    with a_node(name, serving=serving) as node:
        for space in (node.here, node.spaces["be1"]):
            space.sysctl({"ipv4.tcp_fastopen": 0x207})
        for service, document in SERVICES.items():
            node.write(service, {"name": service, **document})
        node.start(timeout_s=300)
        yield Guarded(node)


def fill(sock: socket.socket, message: bytes, most: int) -> int:
    """How many messages are taken while nobody reads, up to `most`."""
    sock.setblocking(False)
    for n in range(most):
        try:
            sock.send(message)
        except BlockingIOError:
            return n
    return most


def read_all(sock: socket.socket, size: int) -> bytes:
    got = bytearray()
    while len(got) < size:
        got += sock.recv(size - len(got)) or pytest.fail(f"{len(got)} of {size} bytes")
    return bytes(got)


def rounds(client: socket.socket, server: socket.socket, times: int = 20) -> None:
    for n in range(times):
        question, answer = b"question %d" % n, b"answer %d" % n
        client.sendall(question)
        assert server.recv(100) == question
        server.sendall(answer)
        assert client.recv(100) == answer


def listed(form: Guarded, *socks: socket.socket) -> list[dict[str, Any]]:
    """What `shunt socket list` says of each, {} if nothing."""
    all_rows = form.node.json("socket", "list")
    found = []
    for sock in socks:
        inode = os.fstat(sock.fileno()).st_ino
        rows = [row for row in all_rows if row["inode"] == inode]
        assert len(rows) <= 1, "told once"
        found.append(rows[0] if rows else {})
    return found


def ways(form: Guarded, *socks: socket.socket) -> list[tuple[str, str]]:
    """Whether each passes TCP by, and why not."""
    return [(row.get("stream", ""), row.get("stream_why", "")) for row in listed(form, *socks)]
