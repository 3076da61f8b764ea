# SPDX-License-Identifier: Apache-2.0
"""One network for the demo, the tests and the benchmarks.

```
                    client   192.0.2.2       2001:db8:1::2
                      |eth0  MTU 1500
                      |
                      |wan   192.0.2.1       2001:db8:1::1
                    router   ECMP to the VIPs' prefixes, hashed by five-tuple:
                      |lan     203.0.113.0/24   2001:db8:a::/64   (dsr) via lb1, lb2
                      |        198.51.100.0/24  2001:db8:b::/64   (nat) via lb1, lb2
                      |      10.0.0.1        2001:db8:2::1
     =================+======================= switch: one bridge, MTU 1600
      |        |      |      |       |      |
     lb1      lb2    be1    be2     be3    be4       all one-armed, on eth0
    10.0.0.11  .12   .101   .102    .103   .104
    2001:db8:2::11  ::12    ::101   ...
```

Requests go client - router - load balancer - backend. With direct server return the backend has
the VIP on `lo` and answers by way of the router; with nat the answer passes the load balancer.
The segment's MTU leaves room for an outer IPv6 header around the client's largest packet.

The dsr prefixes use plain ECMP: a node that goes or comes back moves flows to the other node,
the hard case. The nat prefixes use a resilient group, as routers before stateful nodes do: what
went through a lost node moves, but a returning node gets new flows only.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Self

from shunt.lab.napi import attach_pass
from shunt.lab.netns import NETNS_DIR, Namespace, veth
from shunt.lb.errors import ShuntError
from shunt.lb.model import IPAddress

Network = IPv4Network | IPv6Network

BPFFS = Path("/sys/fs/bpf")
CLIENT_MTU, SEGMENT_MTU = 1500, 1600
CLIENT4, CLIENT6 = IPv4Address("192.0.2.2"), IPv6Address("2001:db8:1::2")
SEGMENT4, SEGMENT6 = IPv4Network("10.0.0.0/24"), IPv6Network("2001:db8:2::/64")
GATEWAY4, GATEWAY6 = IPv4Address("10.0.0.1"), IPv6Address("2001:db8:2::1")
DSR_PREFIXES: tuple[Network, ...] = (IPv4Network("203.0.113.0/24"), IPv6Network("2001:db8:a::/64"))
NAT_PREFIXES: tuple[Network, ...] = (IPv4Network("198.51.100.0/24"), IPv6Network("2001:db8:b::/64"))

# Buckets well above the number of flows, so that a bucket holds one live flow or none; one that
# was silent for this long may move to a node that came back.
NAT_GROUP = "type resilient buckets 4096 idle_timer 3 unbalanced_timer 0"

_EVERYWHERE = {
    "ipv6.conf.all.accept_dad": 0,
    "ipv6.conf.default.accept_dad": 0,
    "ipv6.conf.default.accept_ra": 0,
    "ipv4.conf.all.rp_filter": 0,
    "ipv4.conf.default.rp_filter": 0,
}
_FORWARDING = {
    "ipv4.ip_forward": 1,
    "ipv6.conf.all.forwarding": 1,
    "ipv6.conf.default.forwarding": 1,
    "ipv4.conf.all.send_redirects": 0,
    "ipv4.conf.default.send_redirects": 0,
}
# Policy 3 (chosen fields) and not 1 (layer 4): a packet made on this machine carries its socket's
# random hash across the veth, 1 would use that, and it changes when TCP sends again after a
# timeout. No router in a rack sees such a thing.
_ECMP_BY_FIVE_TUPLE = {
    "ipv4.fib_multipath_hash_policy": 3,
    "ipv6.fib_multipath_hash_policy": 3,
    "ipv4.fib_multipath_hash_fields": 0x37,  # addresses, protocol, ports
    "ipv6.fib_multipath_hash_fields": 0x37,
}
# The VIPs stand on `lo` of every backend; none may answer ARP for them.
_SHARED_VIPS = {
    "ipv4.conf.all.arp_ignore": 1,
    "ipv4.conf.all.arp_announce": 2,
}
PREFIX = "shunt-lab-"
PLACES = (NETNS_DIR, Path("/run"), BPFFS)  # where a lab leaves traces
_counter = itertools.count()


@dataclass(frozen=True)
class Host:
    """A machine on the segment; its interface there is `eth0`, the switch's port has its name."""

    role: str
    namespace: Namespace
    address4: IPv4Address
    address6: IPv6Address

    @property
    def addresses(self) -> tuple[IPv4Address, IPv6Address]:
        return self.address4, self.address6


@dataclass
class Lab:
    """The network above, built on entering the context and removed without a trace on leaving.

    `name` carries the process id, so that labs of several processes stand side by side; every
    address is inside a namespace and may repeat. `directory` is for files of whoever runs things
    in the lab, and goes with it.
    """

    balancer_count: int = 2
    backend_count: int = 4
    name: str = ""
    vips: list[IPAddress] = field(default_factory=list)
    balancers: list[Host] = field(default_factory=list)
    backends: list[Host] = field(default_factory=list)
    announced: list[Host] = field(default_factory=list)

    def __post_init__(self) -> None:
        number = next(_counter)
        self.name = self.name or f"{PREFIX}{os.getpid()}" + (f"x{number}" if number else "")
        self.directory = Path("/run", self.name)
        self._links: list[int] = []

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _build(self) -> None:
        if os.geteuid() != 0:
            raise ShuntError(
                "the lab cannot make network namespaces",
                why="this needs root (CAP_SYS_ADMIN, CAP_NET_ADMIN)",
                fix="run it with sudo",
            )
        self.directory.mkdir(mode=0o700)
        self.switch = self._namespace("switch", {"ipv6.conf.default.disable_ipv6": 1})
        self.router = self._namespace("router", _FORWARDING | _ECMP_BY_FIVE_TUPLE)
        self.client = self._namespace("client", {})
        self.switch.ip(f"link add name br0 mtu {SEGMENT_MTU} type bridge mcast_snooping 0")
        self.switch.ip("link set dev br0 up")
        self._connect_client()
        self._plug(self.router, "lan", "router", GATEWAY4, GATEWAY6)
        for number in range(1, self.balancer_count + 1):
            self._add_balancer(number)
        for _ in range(self.backend_count):
            self.add_backend()
        self.announce(self.balancers)

    def _namespace(self, role: str, sysctls: dict[str, int]) -> Namespace:
        namespace = Namespace.create(f"{self.name}-{role}")
        namespace.sysctl(_EVERYWHERE | sysctls)
        return namespace

    def _connect_client(self) -> None:
        veth(self.client, "eth0", self.router, "wan", CLIENT_MTU)
        self.client.ip(
            f"addr add {CLIENT4}/24 dev eth0",
            f"addr add {CLIENT6}/64 dev eth0 nodad",
            "route add default via 192.0.2.1",
            "route add default via 2001:db8:1::1",
        )
        self.router.ip(
            "addr add 192.0.2.1/24 dev wan", "addr add 2001:db8:1::1/64 dev wan nodad"
        )  # fmt: skip

    def _plug(
        self, namespace: Namespace, device: str, port: str, v4: IPv4Address, v6: IPv6Address
    ) -> None:
        veth(namespace, device, self.switch, port, SEGMENT_MTU)
        self.switch.ip(f"link set dev {port} master br0")
        # A bridge floods what is for a host that it does not know (one that was unplugged), and a
        # veth has no filter by MAC: an XDP program would get, and forward, another node's frames.
        self.switch.bridge(f"fdb replace {namespace.mac(device)} dev {port} master static")
        namespace.ip(
            f"addr add {v4}/{SEGMENT4.prefixlen} dev {device}",
            f"addr add {v6}/{SEGMENT6.prefixlen} dev {device} nodad",
        )

    def _host(self, role: str, number: int, sysctls: dict[str, int]) -> Host:
        namespace = self._namespace(role, sysctls)
        # The suffix reads the same in both families: 10.0.0.101 and 2001:db8:2::101.
        host = Host(role, namespace, SEGMENT4[number], SEGMENT6[int(str(number), 16)])
        self._plug(namespace, "eth0", role, *host.addresses)
        namespace.ip(
            f"route add default via {GATEWAY4}", f"route add default via {GATEWAY6}"
        )  # fmt: skip
        return host

    def _add_balancer(self, number: int) -> None:
        host = self._host(f"lb{number}", 10 + number, _FORWARDING)
        self._links.append(attach_pass(self.switch, host.role))
        # What the load balancer does not know must end here and not bounce back to the router.
        host.namespace.ip(*(f"route add unreachable {p}" for p in DSR_PREFIXES + NAT_PREFIXES))
        self.router.ip(*(
            f"nexthop add id {id_} via {address} dev lan"
            for address in host.addresses
            for id_ in _nexthop_ids(number, address.version)
        ))  # fmt: skip
        self.balancers.append(host)

    def add_backend(self) -> Host:
        """A further backend with every VIP on its `lo`; nothing runs on it yet."""
        number = len(self.backends) + 1
        host = self._host(f"be{number}", 100 + number, _SHARED_VIPS)
        self.backends.append(host)
        self._add_vips_to(host, self.vips)
        return host

    def add_vips(self, vips: Iterable[IPAddress]) -> None:
        """Put the VIPs of dsr services on `lo` of every backend, present and future."""
        new = [vip for vip in vips if vip not in self.vips]
        self.vips += new
        for host in self.backends:
            self._add_vips_to(host, new)

    @staticmethod
    def _add_vips_to(host: Host, vips: Sequence[IPAddress]) -> None:
        if vips:
            host.namespace.own(*vips)

    def announce(self, balancers: Sequence[Host]) -> None:
        """The router sends the VIPs' prefixes by way of these, as if they had told it by BGP.

        Replaces a group in one operation: no packet finds the prefix without a route.
        """
        commands: list[str] = []
        for kind, (prefixes, group_type) in enumerate(
            ((DSR_PREFIXES, ""), (NAT_PREFIXES, NAT_GROUP))
        ):
            for prefix in prefixes:
                group = 1000 * (kind + 1) + prefix.version
                numbers = [self.balancers.index(b) + 1 for b in balancers]
                ids = [id_ for n in numbers for id_ in _nexthop_ids(n, prefix.version)]
                members = "/".join(str(id_) for id_ in ids)
                if not balancers:
                    commands += [f"nexthop del id {group}"] * bool(self.announced)
                    continue
                commands.append(f"nexthop replace id {group} group {members} {group_type}")
                if not self.announced:
                    commands.append(f"route replace {prefix} nhid {group}")
        self.announced = list(balancers)
        if commands:
            self.router.ip(*commands)

    def route(self, prefix: Network | IPAddress, via: Host) -> None:
        """Send a prefix past the load balancers, straight to one host."""
        address = via.address4 if prefix.version == 4 else via.address6
        self.router.ip(f"route replace {prefix} via {address} dev lan")

    def unplug(self, host: Host) -> None:
        """Pull the cable: the host's interface loses its carrier and keeps its addresses."""
        self.switch.ip(f"link set dev {host.role} down")

    def plug_in(self, host: Host) -> None:
        self.switch.ip(f"link set dev {host.role} up")

    def close(self) -> None:
        """Remove every namespace, file and pin with this lab's name. Stop what runs in it first."""
        while self._links:
            os.close(self._links.pop())
        for path in _traces(f"{self.name}-*", self.name):
            _remove(path)


def _nexthop_ids(balancer: int, version: int) -> tuple[int, int]:
    """Two ids for one next hop, so that no group ever shrinks to a single one.

    The kernel (6.18, IPv4) asks a group of one for no bucket, so that its buckets look unused, and
    a resilient group would give them all away when the second node returns.
    """
    return 100 * version + 2 * balancer, 100 * version + 2 * balancer + 1


def remove_leftovers() -> list[str]:
    """Remove labs whose process was killed with -9; the names of what was removed.

    Their programs are gone already: they die with the thread that started them.
    """
    removed: list[str] = []
    for path in _traces(f"{PREFIX}*"):
        pid = re.match(r"\d+", path.name.removeprefix(PREFIX))
        if pid and not Path("/proc", pid[0]).exists():
            _remove(path)
            removed.append(str(path))
    return removed


def _traces(*patterns: str) -> list[Path]:
    return [path for place in PLACES for pattern in patterns for path in place.glob(pattern)]


def _remove(path: Path) -> None:
    if path.parent == NETNS_DIR:
        Namespace(path.name).delete()
    else:
        remove_tree(path)


def remove_tree(directory: Path) -> None:
    """Like shutil.rmtree, which cannot be used on bpffs: it refuses to open pins."""
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            remove_tree(path)
        else:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
    with contextlib.suppress(FileNotFoundError):
        directory.rmdir()
