# SPDX-License-Identifier: Apache-2.0
"""What the kernel says about links, addresses and routes (rtnetlink).

The sockets are our own and blocking: the kernel answers a request before `send` returns, so that
the receive that follows never waits and an event loop may call all of this. Messages are encoded
and decoded by pyroute2, whose own sockets each want an event loop for themselves.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Self

from pyroute2.netlink import rtnl  # type: ignore[import-untyped]
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg  # type: ignore[import-untyped]
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg  # type: ignore[import-untyped]
from pyroute2.netlink.rtnl.marshal import MarshalRtnl  # type: ignore[import-untyped]
from pyroute2.netlink.rtnl.nsidmsg import nsidmsg  # type: ignore[import-untyped]
from pyroute2.netlink.rtnl.rtmsg import rtmsg  # type: ignore[import-untyped]

from shunt.lb.errors import ShuntError

IPAddress = IPv4Address | IPv6Address

# linux/netlink.h
SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP, NETLINK_EXT_ACK = 1, 11
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_DUMP = 0x1, 0x4, 0x10, 0x300
NLM_F_REPLACE, NLM_F_CREATE = 0x100, 0x400
NLMSG_ERROR, NLMSG_DONE = 2, 3
# linux/if.h, linux/if_arp.h, linux/if_addr.h, linux/rtnetlink.h
IFF_UP, IFF_LOOPBACK, IFF_RUNNING, IFF_LOWER_UP = 0x1, 0x8, 0x40, 0x10000
ARPHRD_ETHER = 1
IFA_F_SECONDARY, IFA_F_DADFAILED, IFA_F_DEPRECATED, IFA_F_TENTATIVE = 0x01, 0x08, 0x20, 0x40
RTN_UNICAST, RTN_LOCAL = 1, 2
RTEXT_FILTER_SKIP_STATS = 1 << 3
RTM_F_FIB_MATCH = 0x2000
# bpf/vlan.h
TAG_PROVIDER, TAG_BITS, TAGS_MAX = 0x1000, 16, 2
_ETH_P_8021AD = 0x88A8

# The kernel fills at most 32 KiB of a dump at a time.
_RECEIVE_BYTES = 1 << 16
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_ROUTE_TYPES = (
    "unspecified", "unicast", "local", "broadcast", "anycast", "multicast", "blackhole",
    "unreachable", "prohibit", "throw",
)  # fmt: skip
# `fib_lookup` turns these types of route into errors.
_NO_ROUTE = {
    errno.ENETUNREACH: "the routing table has no route that leads there",
    errno.EHOSTUNREACH: "its route is of type unreachable, or the host cannot be reached",
    errno.EINVAL: "its route is of type blackhole, or the address is not one to send to",
    errno.EACCES: "its route is of type prohibit",
}


@dataclass(frozen=True, slots=True)
class Link:
    """A network device. `mac` is empty unless it speaks Ethernet."""

    ifindex: int
    name: str
    mac: bytes
    mtu: int
    up: bool
    carrier: bool = True
    kind: str = ""  # veth, bond, bridge, dummy, ...; empty for hardware
    loopback: bool = False
    lower: int = 0  # ifindex of the device below, or of a veth's other end
    lower_nsid: int | None = None  # set if that is in another namespace: our number for it
    vlan: int = 0  # the tag that a VLAN device puts on: its number, and TAG_PROVIDER
    master: int = 0  # ifindex of the bond or bridge that it is a part of

    @property
    def ethernet(self) -> bool:
        return len(self.mac) == 6


@dataclass(frozen=True, slots=True)
class InterfaceAddress:
    """An address of this host."""

    ifindex: int
    address: IPAddress
    prefix_length: int
    flags: int = 0

    @property
    def usable(self) -> bool:
        """False while, or after, duplicate address detection forbids its use."""
        return not self.flags & (IFA_F_TENTATIVE | IFA_F_DADFAILED)

    @property
    def primary(self) -> bool:
        """Whether new connections may come from it: not a further one of its network, or a
        temporary or deprecated one of IPv6."""
        return not self.flags & (IFA_F_SECONDARY | IFA_F_DEPRECATED)


@dataclass(frozen=True, slots=True)
class Route:
    """The way the kernel would send to `destination`. MTU: the smaller of route and device."""

    destination: IPAddress
    link: Link
    mtu: int
    gateway: IPAddress | None = None  # None: on the link itself
    source: IPAddress | None = None  # this host's address towards it
    local: bool = False  # an address of this host
    tunnel: bool = False  # the route itself encapsulates (lwtunnel)
    advmss: int = 0  # 0: as the MTU gives
    port: int = 0  # ifindex of the device that frames leave by, below all VLAN devices
    tags: int = 0  # that they have there, as struct nexthop_val holds them

    @property
    def next_hop(self) -> IPAddress:
        """Whose MAC a frame carries."""
        return self.gateway if self.gateway is not None else self.destination


@dataclass(frozen=True, slots=True)
class RouteEntry:
    """What names one route in its table, and what a change of it must repeat."""

    prefix: IPv4Network | IPv6Network
    metric: int
    table: int
    protocol: int
    source: IPAddress | None = None


class Netlink:
    """A request socket in the network namespace of the thread that makes it.

    Not to be shared by threads. Every method raises OSError for what the kernel refuses, except
    where it says ShuntError; the socket can be used on afterwards.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        try:
            self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
            # Never reached unless an answer is lost; then an error is better than a hang.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 5, 0))
            self._socket.bind((0, 0))
        except OSError:
            self._socket.close()
            raise
        self._marshal = MarshalRtnl()
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def request(self, kind: int, message: Any, flags: int = 0) -> list[Any]:
        """Send one request; the messages that answer it. Raises: OSError with the kernel's word."""
        self._send(kind, message, flags | NLM_F_ACK)
        return list(self._answers())

    def dump(self, kind: int, message: Any) -> list[Any]:
        """Everything of a kind, taken again if it changed while it was read."""
        for _ in range(10):
            self._send(kind, message, NLM_F_DUMP)
            answers = list(self._answers())
            if not any(answer["header"]["flags"] & NLM_F_DUMP_INTR for answer in answers):
                break
        return answers

    def _send(self, kind: int, message: Any, flags: int) -> None:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        header = message["header"]
        header["type"], header["flags"] = kind, NLM_F_REQUEST | flags
        header["sequence_number"] = self._sequence
        message.reset()
        message.encode()
        self._socket.send(message.data)

    def _answers(self) -> Iterator[Any]:
        while True:
            for answer in self._marshal.parse(self._socket.recv(_RECEIVE_BYTES)):
                header = answer["header"]
                # The rest of a dump that somebody stopped reading.
                if header["sequence_number"] != self._sequence:
                    continue
                if header["error"] is not None:
                    code = getattr(header["error"], "code", errno.EPROTO)
                    text = answer.get_attr("NLMSGERR_ATTR_MSG") if code != errno.EPROTO else None
                    raise OSError(code, text or os.strerror(code))
                if header["type"] in (NLMSG_ERROR, NLMSG_DONE):
                    return
                yield answer

    def links(self) -> dict[int, Link]:
        """Every device, by ifindex."""
        message = ifinfmsg()
        message["attrs"] = [("IFLA_EXT_MASK", RTEXT_FILTER_SKIP_STATS)]
        found = (to_link(answer) for answer in self.dump(rtnl.RTM_GETLINK, message))
        return {link.ifindex: link for link in found}

    def link(self, name: str) -> Link:
        """The device of this name, which must be up.

        Raises: ShuntError if it is absent or down.
        """
        return pick(self.links().values(), name)

    def nsid(self, namespace: int) -> int:
        """This namespace's number for another, by a descriptor; negative if it has none."""
        message = nsidmsg()
        message["attrs"] = [("NETNSA_FD", namespace)]
        return int(self.request(rtnl.RTM_GETNSID, message)[0].get_attr("NETNSA_NSID"))

    def addresses(self) -> list[InterfaceAddress]:
        """Every address of this host."""
        found: list[InterfaceAddress] = []
        for answer in self.dump(rtnl.RTM_GETADDR, ifaddrmsg()):
            # On a point-to-point link IFA_ADDRESS is the peer's.
            text = answer.get_attr("IFA_LOCAL") or answer.get_attr("IFA_ADDRESS")
            if text is not None:
                flags = answer.get_attr("IFA_FLAGS") or answer["flags"]
                found.append(
                    InterfaceAddress(answer["index"], ip_address(text), answer["prefixlen"], flags)
                )
        return found

    def resolve(self, address: IPAddress, links: Mapping[int, Link] | None = None) -> Route:
        """The kernel's route to an address. `links` saves asking for the devices each time.

        Raises: ShuntError if there is none, or one that refuses.
        """
        answer = self._route(address, 0)
        if answer["type"] not in (RTN_UNICAST, RTN_LOCAL):
            raise _no_route(address, f"its route is of type {_type_name(answer['type'])}")
        links = links if links is not None else self.links()
        link = links.get(answer.get_attr("RTA_OIF") or 0)
        if link is None:
            raise _no_route(address, "its device has just gone")
        return _to_route(address, link, answer, links)

    def entry(self, address: IPAddress) -> RouteEntry | None:
        """The entry of the routing table that `resolve` follows; None if it has several next hops.

        Raises: ShuntError as `resolve` does.
        """
        answer = self._route(address, RTM_F_FIB_MATCH)
        if answer.get_attr("RTA_OIF") is None:
            return None
        anywhere = "0.0.0.0" if address.version == 4 else "::"
        source = answer.get_attr("RTA_PREFSRC")
        return RouteEntry(
            prefix=ip_network(f"{answer.get_attr('RTA_DST') or anywhere}/{answer['dst_len']}"),
            metric=answer.get_attr("RTA_PRIORITY") or 0,
            table=answer.get_attr("RTA_TABLE") or answer["table"],
            protocol=answer["proto"],
            source=ip_address(source) if source else None,
        )

    def _route(self, address: IPAddress, flags: int) -> Any:
        message = rtmsg()
        message["family"] = FAMILIES[address.version]
        message["dst_len"] = address.max_prefixlen
        message["flags"] = flags
        message["attrs"] = [("RTA_DST", str(address))]
        try:
            return self.request(rtnl.RTM_GETROUTE, message)[0]
        except OSError as error:
            if error.errno not in _NO_ROUTE:
                raise
            raise _no_route(address, _NO_ROUTE[error.errno]) from error


def pick(links: Iterable[Link], name: str) -> Link:
    """The device of this name among `links`, which must be up.

    Raises: ShuntError if it is absent or down.
    """
    named = {link.name: link for link in links}
    if name not in named:
        raise ShuntError(
            f"interface {name} does not exist",
            why=f"this host has {', '.join(sorted(named))}",
            fix="correct `interfaces` in shunt.yaml, or bring the device in (`ip link`)",
        )
    if not named[name].up:
        raise ShuntError(
            f"interface {name} is down",
            why="a program attached there would see no packet",
            fix=f"ip link set dev {name} up",
        )
    return named[name]


# After a return of the carrier the second comes later, and until then nothing is sent.
_SENDS = IFF_LOWER_UP | IFF_RUNNING


def to_link(message: Any) -> Link:
    """A decoded RTM_NEWLINK or RTM_DELLINK."""
    flags = message["flags"]
    mac = message.get_attr("IFLA_ADDRESS") if message["ifi_type"] == ARPHRD_ETHER else None
    info = message.get_attr("IFLA_LINKINFO")
    kind = (info.get_attr("IFLA_INFO_KIND") or "") if info is not None else ""
    data = info.get_attr("IFLA_INFO_DATA") if kind == "vlan" else None
    return Link(
        ifindex=message["index"],
        name=message.get_attr("IFLA_IFNAME") or "",
        mac=bytes.fromhex(mac.replace(":", "")) if mac else b"",
        mtu=message.get_attr("IFLA_MTU") or 0,
        up=bool(flags & IFF_UP),
        carrier=flags & _SENDS == _SENDS,
        kind=kind,
        loopback=bool(flags & IFF_LOOPBACK),
        lower=message.get_attr("IFLA_LINK") or 0,
        lower_nsid=message.get_attr("IFLA_LINK_NETNSID"),
        vlan=_vlan(data) if data is not None else 0,
        master=message.get_attr("IFLA_MASTER") or 0,
    )


def _vlan(data: Any) -> int:
    """The tag of a VLAN device, from its IFLA_INFO_DATA."""
    number = int(data.get_attr("IFLA_VLAN_ID") or 0)
    provider = bool(data.get_attr("IFLA_VLAN_PROTOCOL") == _ETH_P_8021AD)
    return number | TAG_PROVIDER * provider


def ports(link: Link, links: Mapping[int, Link]) -> list[Link]:
    """The devices that a link's frames really come in by: a bond's parts, or itself."""
    if link.kind != "bond":
        return [link]
    return [part for part in links.values() if part.master == link.ifindex]


def below_vlans(link: Link, links: Mapping[int, Link]) -> tuple[int, int]:
    """The device below a stack of VLAN devices, and the tags of frames there; itself, if none.

    Also itself if there are more tags than a next hop holds, or the lower one is out of sight.
    """
    port = link
    tags: list[int] = []
    while port.kind == "vlan":
        lower = links.get(port.lower) if port.lower_nsid is None else None
        if lower is None or not port.vlan or len(tags) == TAGS_MAX:
            return link.ifindex, 0
        tags.append(port.vlan)
        port = lower
    return port.ifindex, sum(tag << TAG_BITS * i for i, tag in enumerate(tags))


def _to_route(address: IPAddress, link: Link, answer: Any, links: Mapping[int, Link]) -> Route:
    port, tags = below_vlans(link, links)
    # An IPv4 route may have an IPv6 gateway (RFC 8950): then it stands in RTA_VIA.
    via = answer.get_attr("RTA_VIA")
    gateway = answer.get_attr("RTA_GATEWAY") or (via["addr"] if via else None)
    source = answer.get_attr("RTA_PREFSRC")
    metrics = answer.get_attr("RTA_METRICS")
    route_mtu = metrics.get_attr("RTAX_MTU") if metrics is not None else None
    return Route(
        destination=address,
        link=link,
        mtu=min(route_mtu or link.mtu, link.mtu),
        gateway=ip_address(gateway) if gateway else None,
        source=ip_address(source) if source else None,
        local=answer["type"] == RTN_LOCAL,
        tunnel=answer.get_attr("RTA_ENCAP_TYPE") is not None,
        port=port,
        tags=tags,
        advmss=(metrics.get_attr("RTAX_ADVMSS") or 0) if metrics is not None else 0,
    )


def _type_name(kind: int) -> str:
    return _ROUTE_TYPES[kind] if kind < len(_ROUTE_TYPES) else str(kind)


def _no_route(address: IPAddress, why: str) -> ShuntError:
    return ShuntError(
        f"no route to {address}",
        why=why,
        fix=f"add a route (`ip route get {address}` shows the kernel's answer)"
        " or correct the address",
    )
