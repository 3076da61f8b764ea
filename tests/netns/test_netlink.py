# SPDX-License-Identifier: Apache-2.0
"""Netlink against the running kernel.

```
    here                      there
    eth0 10.9.0.1/24  ------  eth0 10.9.0.2/24       (10.9.0.9 is nobody)
         fd09::1/64                fd09::2/64
```
"""

import ctypes
import errno
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest

from shunt.kern import _routes, neighbours
from shunt.kern.events import (
    Event,
    Events,
    NeighbourChanged,
    PathsChanged,
    Resync,
    RouteChanged,
)
from shunt.kern.neighbours import NUD_FAILED, NUD_INCOMPLETE, NUD_PERMANENT, NUD_STALE
from shunt.kern.netlink import NLM_F_REQUEST, Netlink, RouteEntry
from shunt.kern.routes import Routes
from shunt.lab.netns import Namespace, veth
from shunt.lb.errors import ShuntError

THERE4, THERE6 = IPv4Address("10.9.0.2"), IPv6Address("fd09::2")
SOON = struct.pack("ll", 0, 1000)  # a timeout
SO_ATTACH_FILTER = 26  # asm-generic/socket.h
AT_ONCE = _routes.AT_ONCE
NOBODY = IPv4Address("10.9.0.9")


@pytest.fixture
def pair() -> Iterator[tuple[Namespace, Namespace]]:
    here = Namespace.create(f"shunt-nl-{os.getpid()}-here")
    try:
        there = Namespace.create(f"shunt-nl-{os.getpid()}-there")
        try:
            for namespace in (here, there):
                # The link-local address, from which neighbours are asked for, at once.
                namespace.sysctl({"ipv6.conf.default.accept_dad": 0})
            veth(here, "eth0", there, "eth0", 1500)
            for namespace, last in ((here, 1), (there, 2)):
                namespace.ip(
                    f"addr add 10.9.0.{last}/24 dev eth0",
                    f"addr add fd09::{last}/64 dev eth0 nodad",
                )
            yield here, there
        finally:
            there.delete()
    finally:
        here.delete()


@pytest.fixture
def here(pair: tuple[Namespace, Namespace]) -> Namespace:
    return pair[0]


@pytest.fixture
def netlink(here: Namespace) -> Iterator[Netlink]:
    with here.inside():
        netlink = Netlink()
    with netlink:
        yield netlink


@pytest.fixture
def events(here: Namespace) -> Iterator[Events]:
    with here.inside():
        events = Events()
    with events:
        events.read()
        yield events


def wait_for(events: Events, wanted: Callable[[Event], bool]) -> Event:
    """The first event that is wanted; fails after 30 s.

    An entry that fails may be asked for again at once, and its last word alone is told: its next
    failure comes seconds later.
    """
    end = time.monotonic() + 30
    seen: list[Event] = []
    while time.monotonic() < end:
        if select.select([events], [], [], 0.2)[0]:
            seen += (got := events.read())
            for event in got:
                if wanted(event):
                    return event
    raise AssertionError(f"not among {seen}")


def test_links(netlink: Netlink, here: Namespace) -> None:
    link = netlink.link("eth0")
    assert (link.name, link.mtu, link.up, link.carrier, link.kind) == (
        "eth0", 1500, True, True, "veth",
    )  # fmt: skip
    shown = here.run("cat", "/proc/self/net/dev").stdout
    assert "eth0" in shown
    assert link.mac.hex(":") in here.run("ip", "link", "show", "eth0").stdout
    assert link.ethernet
    lo = next(link for link in netlink.links().values() if link.name == "lo")
    assert lo.loopback
    assert not lo.ethernet


def test_absent_or_down_interfaces_are_refused(netlink: Netlink, here: Namespace) -> None:
    with pytest.raises(ShuntError, match=r"(?s)eth7 does not exist.*this host has eth0, lo.*fix"):
        netlink.link("eth7")
    here.ip("link set dev eth0 down")
    with pytest.raises(ShuntError, match="interface eth0 is down") as caught:
        netlink.link("eth0")
    here.ip(caught.value.fix.removeprefix("ip "))
    assert netlink.link("eth0").up


def test_addresses_of_this_host(netlink: Netlink) -> None:
    found = {(str(a.address), a.prefix_length) for a in netlink.addresses() if a.usable}
    assert {("10.9.0.1", 24), ("fd09::1", 64), ("127.0.0.1", 8)} <= found


@pytest.mark.parametrize("address", [THERE4, THERE6])
def test_route_on_the_link(netlink: Netlink, address: IPv4Address | IPv6Address) -> None:
    route = netlink.resolve(address)
    assert (route.link.name, route.gateway, route.next_hop, route.mtu, route.local) == (
        "eth0", None, address, 1500, False,
    )  # fmt: skip
    assert route.source == ip_address("10.9.0.1" if address.version == 4 else "fd09::1")


def test_route_by_a_gateway_with_an_mtu_and_a_source(netlink: Netlink, here: Namespace) -> None:
    here.ip(
        "addr add 10.9.0.77/24 dev eth0",
        "route add 10.20.0.0/16 via 10.9.0.2 mtu 1400 advmss 1300 src 10.9.0.77",
        "route add 10.21.0.0/16 via inet6 fd09::2",
        "route add fd20::/64 via fd09::2 mtu 1380",
    )
    route = netlink.resolve(IPv4Address("10.20.1.1"))
    assert (route.gateway, route.mtu, route.source) == (THERE4, 1400, ip_address("10.9.0.77"))
    assert route.advmss == 1300
    # RFC 8950: an IPv4 route with an IPv6 next hop.
    assert netlink.resolve(IPv4Address("10.21.1.1")).next_hop == THERE6
    route = netlink.resolve(IPv6Address("fd20::5"))
    assert (route.next_hop, route.mtu) == (THERE6, 1380)


@pytest.mark.parametrize("kind", ["unreachable", "blackhole", "prohibit", "none"])
@pytest.mark.parametrize("address", ["10.66.1.1", "fd66::1"])
def test_no_route(netlink: Netlink, here: Namespace, kind: str, address: str) -> None:
    if kind != "none":
        here.ip(f"route add {kind} {address}")
    with pytest.raises(ShuntError, match=f"(?s)no route to {address}.*why: .*fix: "):
        netlink.resolve(ip_address(address))
    # The socket is in step afterwards.
    assert netlink.resolve(THERE4).link.name == "eth0"


def test_an_address_of_this_host_is_flagged(netlink: Netlink) -> None:
    assert netlink.resolve(IPv4Address("10.9.0.1")).local
    assert netlink.resolve(IPv6Address("fd09::1")).local


def test_a_neighbour_is_resolved_and_kept_without_traffic(
    netlink: Netlink, events: Events, pair: tuple[Namespace, Namespace]
) -> None:
    ifindex = netlink.link("eth0").ifindex
    with pair[1].inside(), Netlink() as other:
        mac = other.link("eth0").mac
    for address in (THERE4, THERE6):
        assert neighbours.find(netlink, ifindex, address) is None
        neighbours.keep(netlink, ifindex, address)
        event = wait_for(
            events,
            lambda e, a=address: (
                isinstance(e, NeighbourChanged)  # type: ignore[misc]
                and e.neighbour.address == a
                and e.neighbour.usable_mac == mac
            ),
        )
        assert isinstance(event, NeighbourChanged)
        assert (event.neighbour.managed, event.neighbour.ours, event.gone) == (True, True, False)
        assert neighbours.release(netlink, ifindex, address)
        released = neighbours.find(netlink, ifindex, address)
        assert released is not None
        assert (released.managed, released.usable_mac) == (False, mac)
        assert not neighbours.release(netlink, ifindex, address)


def test_a_neighbour_that_does_not_answer_fails(netlink: Netlink, events: Events) -> None:
    ifindex = netlink.link("eth0").ifindex
    first = neighbours.keep(netlink, ifindex, NOBODY)
    assert first is not None
    assert (first.state, first.usable_mac) == (NUD_INCOMPLETE, None)
    wait_for(
        events,
        lambda e: isinstance(e, NeighbourChanged) and e.neighbour.state == NUD_FAILED,
    )


def test_only_our_own_entries_are_touched(netlink: Netlink, here: Namespace) -> None:
    ifindex = netlink.link("eth0").ifindex
    here.ip(
        "neigh add 10.9.0.50 lladdr 02:00:00:00:00:50 dev eth0 nud permanent",
        "neigh add 10.9.0.51 dev eth0 managed",
    )
    for last in (50, 51, 52):
        neighbours.keep(netlink, ifindex, IPv4Address(f"10.9.0.{last}"))
    assert neighbours.release_all(netlink) == 1
    table = {str(n.address): n for n in neighbours.all_of(netlink)}
    assert table["10.9.0.50"].state == NUD_PERMANENT
    assert table["10.9.0.51"].managed
    assert not table["10.9.0.52"].managed
    assert neighbours.release_all(netlink) == 0


def test_events_name_what_changed(netlink: Netlink, events: Events, here: Namespace) -> None:
    here.ip("route add 10.30.0.0/16 via 10.9.0.2")
    assert RouteChanged(ip_network("10.30.0.0/16")) in events.read()
    here.ip("route add default via 10.9.0.2", "route add default via fd09::2")
    read = events.read()
    assert RouteChanged(ip_network("0.0.0.0/0")) in read
    assert RouteChanged(ip_network("::/0")) in read
    for command in (
        "link set dev eth0 mtu 1400",
        "addr add 10.9.0.88/32 dev eth0",
        "rule add from 10.1.1.1 table 7",
        "nexthop add id 5 via 10.9.0.2 dev eth0",
    ):
        here.ip(command)
        assert PathsChanged() in events.read(), command
    here.ip("neigh add 10.9.0.60 lladdr 02:00:00:00:00:60 dev eth0 nud stale")
    here.ip("neigh replace 10.9.0.60 lladdr 02:00:00:00:00:61 dev eth0 nud stale")
    # Two changes of one neighbour between two looks: its last word.
    told = [e for e in events.read() if isinstance(e, NeighbourChanged)]
    assert [(e.neighbour.mac[-1], e.neighbour.state) for e in told] == [(0x61, NUD_STALE)]
    here.ip("neigh del 10.9.0.60 dev eth0")
    wait_for(events, lambda e: isinstance(e, NeighbourChanged) and e.gone)


def test_more_than_fits_is_a_resync(here: Namespace) -> None:
    with here.inside():
        events = Events(buffer_bytes=1)  # the kernel makes it its least, some 2 KiB
    with events:
        here.ip(*(f"route add 10.40.{n}.0/24 via 10.9.0.2" for n in range(200)))
        assert Resync() in events.read()
        # And it hears again.
        events.read()
        here.ip("route add 10.50.0.0/16 via 10.9.0.2")
        wait_for(events, lambda e: e == RouteChanged(ip_network("10.50.0.0/16")))


def test_the_entry_behind_a_route(netlink: Netlink, here: Namespace) -> None:
    here.ip(
        "route add 10.20.0.0/16 via 10.9.0.2 metric 50 src 10.9.0.1 proto 77",
        "route add default via fd09::2",
        "route add 10.60.0.0/16 nexthop via 10.9.0.2 dev eth0 nexthop via 10.9.0.3 dev eth0",
    )
    assert netlink.entry(ip_address("10.20.1.1")) == RouteEntry(
        ip_network("10.20.0.0/16"), metric=50, table=254, protocol=77, source=ip_address("10.9.0.1")
    )
    entry = netlink.entry(ip_address("fd99::1"))
    assert entry is not None
    assert (entry.prefix, entry.metric) == (ip_network("::/0"), 1024)
    assert netlink.entry(ip_address("10.60.0.1")) is None
    assert netlink.resolve(IPv4Address("10.60.0.1")).gateway is not None


def test_many_routes_at_once_are_the_routes_one_by_one(here: Namespace, netlink: Netlink) -> None:
    here.ip(
        *(f"route add 10.{n}.0.0/16 via {THERE4}" for n in range(1, 5)),
        f"route add 10.5.0.0/16 via {THERE4} mtu 1400",
        f"route add 10.6.0.0/16 via inet6 {THERE6}",
        "route add blackhole 10.7.0.0/16",
        "route add unreachable 10.8.0.0/16",
        f"route add 2001:db8:5::/48 via {THERE6}",
    )
    four, six = ip_address("10.0.0.77"), ip_address("2001:db8:5::")
    addresses = [four + (n << 16) + again for n in range(10) for again in range(5)]
    addresses += [six + again for again in range(5)]
    others = ("10.9.0.1", "fd09::1", "fd09::2", "127.0.0.1", "::1", "2001:db8:6::1")
    addresses += map(ip_address, others)
    with here.inside(), Routes() as routes:
        told = dict(routes.ask(addresses))
    assert list(told) == addresses
    links = netlink.links()
    for address, answer in told.items():
        try:
            wanted = replace(netlink.resolve(address, links), advmss=0)
        except ShuntError:
            assert not answer.ordinary
        else:
            assert answer.route(address, links[answer.ifindex], links) == wanted
    # Behind one gateway there is one answer, however many ask.
    assert len({id(told[four + (1 << 16) + again]) for again in range(5)}) == 1


def test_an_answer_that_does_not_come_is_an_error_of_its_own(here: Namespace) -> None:
    addresses = [THERE4 + n for n in range(40)]
    with here.inside(), Routes() as routes:
        told = []
        for address, answer in routes.ask(addresses):
            told.append((address, answer.error))
            if len(told) == AT_ONCE:
                lose(routes._socket, routes._sequence + 4)
                routes._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, SOON)
        assert [address for address, _ in told] == addresses
        assert {a for a, error in told[: 2 * AT_ONCE] if error} == {addresses[AT_ONCE + 4]}
        assert {error for _, error in told if error} == {errno.EAGAIN}
        assert all(error for _, error in told[2 * AT_ONCE :])
        # The next question has a socket of its own.
        assert [answer.error for _, answer in routes.ask(addresses[:3])] == [0, 0, 0]


def test_an_answer_to_another_question_is_an_error(here: Namespace) -> None:
    addresses = [THERE4 + n for n in range(40)]
    with here.inside(), Routes() as routes:
        _routes.ask(routes._socket.fileno(), 1000, [a.packed for a in addresses[:3]])
        routes._socket.send(request(1000, addresses[0].packed))
        told = dict(routes.ask(addresses))
        assert list(told) == addresses
        assert {answer.error for answer in told.values()} == {errno.EPROTO}
        # The next question has a socket of its own.
        assert [answer.error for _, answer in routes.ask(addresses[:3])] == [0, 0, 0]


@pytest.mark.parametrize("some", [[], [b"1234"] * (AT_ONCE + 1), [b"1234", b"12345"]])
def test_what_cannot_be_asked_is_refused(here: Namespace, some: list[bytes]) -> None:
    with here.inside(), Routes() as routes:
        with pytest.raises(ValueError, match=r"from 1 to 16 addresses|4 or 16 bytes, not 5"):
            _routes.ask(routes._socket.fileno(), 0, some)
        with pytest.raises(TypeError):
            _routes.ask(routes._socket.fileno(), 0, ["10.0.0.1"])  # type: ignore[list-item]
        # Nothing was asked.
        assert [answer.error for _, answer in routes.ask([THERE4])] == [0]


def request(sequence: int, address: bytes) -> bytes:
    """RTM_GETROUTE to an IPv4 address: nlmsghdr, rtmsg, RTA_DST."""
    route = struct.pack("=BB10xHH4s", socket.AF_INET, 32, 8, 1, address)
    return struct.pack("=IHHII", 16 + len(route), 26, NLM_F_REQUEST, sequence, 0) + route


def lose(netlink: socket.socket, sequence: int) -> None:
    """Have the kernel drop the answer of this sequence number instead of delivering it."""
    code = (
        (0x20, 0, 0, 8),  # load nlmsghdr.nlmsg_seq, which is taken for big-endian
        (0x15, 0, 1, socket.htonl(sequence)),
        (0x06, 0, 0, 0),  # of 0 bytes: gone
        (0x06, 0, 0, 0xFFFFFFFF),
    )
    filters = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
    program = struct.pack("HP", len(code), ctypes.addressof(filters))
    netlink.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
