# SPDX-License-Identifier: Apache-2.0
"""A trunk: a cable, or a bond of two, that carries the clients' VLAN and the backends'.

```
    here                              out                   its VLAN devices live in
    trunk.100 10.100.0.1/24           trunk.100 10.100.0.9  client
              fd00:100::1/64                    fd00:100::9
    trunk.200 10.200.0.1/24           trunk.200 10.200.0.2  server: TCP 80 echoes, VIPs on lo,
              fd00:200::1/64                    fd00:200::2   decap
    trunk ======================== trunk
    (a veth, or a bond of eth0 and eth1)
```

The node runs in this process until it has found the backend, as emulated processors take long to
start another; what it has pinned goes on without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import socket
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

import pytest

from shunt.agent.doctor import Finding, Level
from shunt.agent.doctor_trunk import check_trunks
from shunt.agent.facts import gather_balancer
from shunt.agent.node import Node
from shunt.agent.views import interfaces, reasons
from shunt.kern import features
from shunt.kern.bpffs import ensure_bpffs
from shunt.lab import napi
from shunt.lab.netns import Namespace, veth
from shunt.lb.errors import ShuntError
from shunt.lb.model import (
    Backend,
    Configuration,
    Limits,
    Mode,
    Port,
    Protocol,
    Service,
    Settings,
)
from shunt.xdp import decap
from shunt.xdp.attach import cleanup

BACKENDS = {4: ip_address("10.200.0.2"), 6: ip_address("fd00:200::2")}
DIRECT, NAT = ip_address("203.0.113.10"), ip_address("203.0.113.11")
VIPS = {
    DIRECT: Mode.DSR_L2,
    NAT: Mode.NAT,
    ip_address("203.0.113.12"): Mode.DSR_IPIP,
    ip_address("2001:db8:a::10"): Mode.DSR_L2,
    ip_address("2001:db8:a::11"): Mode.NAT,
    ip_address("2001:db8:a::12"): Mode.DSR_IPIP,
}
XdpMode = Literal["auto", "native", "generic"]
LIMITS = Limits(
    frontends=256, services=64, slots=4096, backends=256, nexthops=64, flows=1024, nat=1024
)
TIMEOUT_S = 60.0
TAGS = {100: ("client", 9), 200: ("server", 2)}
# How often a bond looks at its cables, in milliseconds.
LOOK = "miimon 50"


def need(probe: str) -> None:
    found = getattr(features, probe)()
    if not found.present:
        pytest.skip(f"needs {probe}: {found.why}")


class Trunk:
    """The four namespaces, and a node while it is running."""

    node: Node

    def __init__(
        self,
        namespaces: dict[str, Namespace],
        bpffs: Path,
        state: Path,
        may_answer: threading.Event,
    ) -> None:
        self.here, self.out = namespaces["here"], namespaces["out"]
        self.client = namespaces["client"]
        self.bpffs, self.state, self.may_answer = bpffs, state, may_answer

    def configuration(self, names: tuple[str, ...], xdp: XdpMode = "auto") -> Configuration:
        port = (Port(80, Protocol.TCP),)
        services = (
            Service(f"{mode}-{v.version}", (v,), port, mode, (Backend(BACKENDS[v.version]),))
            for v, mode in VIPS.items()
        )
        return Configuration(Settings(names, xdp, limits=LIMITS), tuple(services))

    @contextlib.contextmanager
    def running(self, *names: str, xdp: XdpMode = "auto") -> Iterator[dict[str, str]]:
        """Attached, with its backend found; the modes it is attached in, by interface."""
        self.node = Node(self.bpffs, self.state)
        with asyncio.Runner() as runner, self.here.inside():
            try:
                runner.run(self._start(self.configuration(names, xdp)))
                yield {i["name"]: i["mode"] for i in interfaces(self.node)}
            finally:
                runner.run(self.node.close())

    async def _start(self, configuration: Configuration) -> None:
        self.node.start(configuration)
        async with asyncio.timeout(TIMEOUT_S):
            while self.node.nexthops.problems():  # noqa: ASYNC110 - the kernel sets no Event
                await asyncio.sleep(0.05)

    def connect(self, vip: object, timeout_s: float = TIMEOUT_S) -> socket.socket:
        with self.client.inside():
            return socket.create_connection((str(vip), 80), timeout=timeout_s)

    def serve_all(self) -> None:
        """A connection to each VIP, with segments of full size; they have gone through XDP."""
        before = self.sent()
        for vip in VIPS:
            with self.connect(vip) as connection:
                exchange(connection, b"x" * 30000)
        assert self.sent() > before + len(VIPS) * 20

    def sent(self) -> int:
        """Packets that the program has sent to the backend."""
        return int(reasons(self.node).get("SENT_TO_BACKEND", {"packets": 0})["packets"])


def exchange(connection: socket.socket, text: bytes) -> None:
    """Send it; all of it comes back."""
    connection.sendall(text)
    receive(connection, text)


def receive(connection: socket.socket, text: bytes) -> None:
    got = b""
    while len(got) < len(text):
        part = connection.recv(65536)
        assert part, "closed"
        got += part
    assert got == text


def echo(listener: socket.socket, may_answer: threading.Event) -> None:
    """Until the listener is shut down."""

    def answer(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(65536):
                may_answer.wait()
                connection.sendall(data)

    with contextlib.suppress(OSError):
        while True:
            threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()


def wire(here: Namespace, out: Namespace, bond: str) -> tuple[str, ...]:
    """The cables, as a bond where one is wanted; the tags stay in the frames, as on a wire."""
    cables = ("eth0", "eth1") if bond else ("trunk",)
    for cable in cables:
        veth(here, cable, out, cable, 1500)
    for namespace in (here, out):
        for cable in cables:
            namespace.run("ethtool", "-K", cable, "txvlan", "off", "rxvlan", "off")
        if bond:
            namespace.ip(
                f"link add name trunk type bond mode {bond} {LOOK}",
                *(f"link set dev {cable} down" for cable in cables),
                *(f"link set dev {cable} master trunk" for cable in cables),
                "link set dev trunk up",
            )
        namespace.ip(*(f"link add link trunk name trunk.{n} type vlan id {n}" for n in TAGS))
    return cables


def settle(made: dict[str, Namespace]) -> None:
    """Addresses and routes; the outer ends of the VLANs move to who lives there."""
    here = made["here"]
    here.sysctl({"ipv4.ip_forward": 1, "ipv6.conf.all.forwarding": 1})
    made["server"].sysctl({"ipv4.conf.all.arp_ignore": 1})
    made["server"].own(*VIPS)
    for tag, (who, host) in TAGS.items():
        four, six = f"10.{tag}.0.", f"fd00:{tag}::"
        here.ip(*interface(tag, f"{four}1", f"{six}1"))
        made["out"].ip(f"link set dev trunk.{tag} netns {made[who].name}")
        made[who].ip(
            *interface(tag, f"{four}{host}", f"{six}{host}"),
            f"route add default via {four}1",
            f"route add default via {six}1",
        )


def interface(tag: int, four: str, six: str) -> tuple[str, ...]:
    device = f"trunk.{tag}"
    return (
        f"addr add {four}/24 dev {device}",
        f"addr add {six}/64 dev {device} nodad",
        f"link set dev {device} up",
    )


@contextlib.contextmanager
def trunk_of(bond: str = "") -> Iterator[Trunk]:
    with contextlib.ExitStack() as stack:
        bpffs = Path(f"/sys/fs/bpf/shunt-tk-{os.getpid()}")
        ensure_bpffs(bpffs)
        stack.callback(shutil.rmtree, bpffs, ignore_errors=True)
        stack.callback(cleanup, bpffs)
        stack.callback(decap.cleanup, bpffs / "server")
        made = {}
        for end in ("here", "out", "client", "server"):
            made[end] = Namespace.create(f"shunt-tk-{os.getpid()}-{end}")
            stack.callback(made[end].delete)
        cables = wire(made["here"], made["out"], bond)
        settle(made)
        # What XDP sends into a veth needs somebody who polls at its other end.
        for cable in cables:
            stack.callback(os.close, napi.attach_pass(made["out"], cable))
        with made["server"].inside():
            decap.attach("trunk.200", bpffs=bpffs / "server")
            listener = socket.create_server(
                ("::", 80), family=socket.AF_INET6, backlog=64, dualstack_ipv6=True
            )
        stack.enter_context(listener)
        may_answer = threading.Event()
        may_answer.set()
        threading.Thread(target=echo, args=(listener, may_answer), daemon=True).start()
        stack.callback(listener.shutdown, socket.SHUT_RDWR)
        state = stack.enter_context(tempfile.TemporaryDirectory(prefix="shunt-tk-"))
        yield Trunk(made, bpffs, Path(state), may_answer)


@pytest.mark.parametrize("xdp", ["native", "generic"])
def test_a_vip_over_a_vlan_of_the_attached_trunk(xdp: XdpMode) -> None:
    need("vlan")
    with trunk_of() as trunk, trunk.running("trunk", xdp=xdp) as modes:
        assert modes == {"trunk": xdp}
        trunk.serve_all()


def test_attached_to_vlan_devices_themselves() -> None:
    need("vlan")
    with trunk_of() as trunk, trunk.running("trunk.100", "trunk.200") as modes:
        assert modes == {"trunk.100": "generic", "trunk.200": "generic"}
        trunk.serve_all()


def judged(trunk: Trunk) -> list[Finding]:
    configuration = trunk.configuration(("trunk",))
    findings = check_trunks(gather_balancer(configuration), configuration)
    return [finding for finding in findings if finding.level is not Level.OK]


def test_tags_out_of_the_frame_are_told_and_the_fix_helps() -> None:
    need("vlan")
    with trunk_of() as trunk, trunk.running("trunk"):
        assert judged(trunk) == []
        trunk.out.run("ethtool", "-K", "trunk", "txvlan", "on")
        (found,) = judged(trunk)
        assert f"nsenter --net=/run/netns/{trunk.out.name} ethtool" in found.fix
        assert "replies of mode nat" in found.why
        with pytest.raises(TimeoutError):
            trunk.connect(NAT, timeout_s=3)
        trunk.here.run("sh", "-ec", found.fix)
        assert judged(trunk) == []
        trunk.serve_all()


BONDS = {
    "active-backup": "active-backup",
    "802.3ad": "802.3ad lacp_rate fast xmit_hash_policy layer3+4",
    "balance-xor": "balance-xor xmit_hash_policy layer3+4",
}


def active(namespace: Namespace) -> str:
    """The part that an active-backup bond uses; empty in other modes."""
    shown = namespace.run("ip", "-d", "-j", "link", "show", "dev", "trunk").stdout
    return str(json.loads(shown)[0]["linkinfo"]["info_data"].get("active_slave", ""))


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def acknowledged(connection: socket.socket) -> bool:
    """Whether all that was sent has arrived."""
    waiting = fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4))
    return not int.from_bytes(waiting, sys.byteorder)


def fail_over(trunk: Trunk) -> None:
    """Connections outlive the loss of the cable in use, and its coming back."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(trunk.connect(vip)) for vip in [*VIPS] * 3]
        for connection in connections:
            exchange(connection, b"x" * 9000)
        first = active(trunk.here)

        # What clients wait for comes although they send nothing after the cable has failed.
        trunk.may_answer.clear()
        for connection in connections:
            connection.sendall(b"question")
        until(lambda: all(map(acknowledged, connections)), "questions arrive")
        trunk.out.ip(f"link set dev {first or 'eth0'} down")
        if first:
            until(lambda: active(trunk.here) not in ("", first), "the bond changes over")
        trunk.may_answer.set()
        for connection in connections:
            receive(connection, b"question")

        for back in (False, True):
            before = trunk.sent()
            if back:
                trunk.out.ip(f"link set dev {first or 'eth0'} up")
            for connection in connections:
                exchange(connection, b"y" * 9000)
            assert trunk.sent() > before + len(connections) * 6  # of full size, at least


@pytest.mark.parametrize("mode", BONDS)
def test_a_bond_in_native_mode_and_its_failover(mode: str) -> None:
    need("bonding")
    with trunk_of(BONDS[mode]) as trunk, trunk.running("trunk", xdp="native") as modes:
        assert modes == {"trunk": "native"}
        assert bool(active(trunk.here)) == (mode == "active-backup")
        fail_over(trunk)


def test_a_bond_in_generic_mode_sees_tags_by_its_vlan_devices_alone() -> None:
    need("bonding")
    with trunk_of(BONDS["active-backup"]) as trunk:
        with trunk.running("trunk", xdp="generic"):
            (found,) = judged(trunk)
            assert "interfaces: [trunk.100, trunk.200]" in found.fix
            with pytest.raises(TimeoutError):
                trunk.connect(DIRECT, timeout_s=3)
        with trunk.running("trunk.100", "trunk.200") as modes:
            assert modes == {"trunk.100": "generic", "trunk.200": "generic"}
            fail_over(trunk)


def test_a_bond_of_a_mode_without_native_xdp() -> None:
    need("bonding")
    with trunk_of("balance-tlb") as trunk:
        with pytest.raises(ShuntError) as refused, trunk.running("trunk", xdp="native"):
            pass
        assert "a bond's wants mode active-backup" in refused.value.fix
