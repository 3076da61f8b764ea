# SPDX-License-Identifier: Apache-2.0
"""Next hops that follow the kernel.

```
    here                      there
    eth0 10.9.0.1/24  ------  eth0 10.9.0.2/24, .3, .4       (10.9.0.9 is nobody)
         fd09::1/64                fd09::2/64
    10.20.0.0/16 via 10.9.0.2
```
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from ipaddress import ip_address

import pytest

from shunt.agent import nexthops
from shunt.agent.nexthops import NextHop, NextHops
from shunt.kern import neighbours
from shunt.kern.events import Event, NeighbourChanged
from shunt.kern.netlink import Netlink
from shunt.lab.netns import Namespace, veth
from shunt.lb.errors import ShuntError
from shunt.lb.model import IPAddress

A, B, NOBODY = (ip_address(f"10.9.0.{last}") for last in (2, 3, 9))
SIX = ip_address("fd09::2")
FAR = ip_address("10.20.0.7")
NEW_MAC = "02:00:00:00:0a:0a"


@pytest.fixture
def pair() -> Iterator[tuple[Namespace, Namespace]]:
    here = Namespace.create(f"shunt-nh-{os.getpid()}-here")
    try:
        there = Namespace.create(f"shunt-nh-{os.getpid()}-there")
        try:
            for namespace in (here, there):
                # The link-local address, from which neighbours are asked for, at once.
                namespace.sysctl({"ipv6.conf.default.accept_dad": 0})
            veth(here, "eth0", there, "eth0", 1500)
            here.ip(
                "addr add 10.9.0.1/24 dev eth0",
                "addr add fd09::1/64 dev eth0 nodad",
                "route add 10.20.0.0/16 via 10.9.0.2",
            )
            there.ip(
                *(f"addr add 10.9.0.{last}/24 dev eth0" for last in (2, 3, 4)),
                "addr add fd09::2/64 dev eth0 nodad",
            )
            yield here, there
        finally:
            there.delete()
    finally:
        here.delete()


class Watched:
    """Next hops with what they told so far."""

    def __init__(self, here: Namespace) -> None:
        self.told: list[set[IPAddress]] = []
        with here.inside():
            self.hops = NextHops(lambda addresses: self.told.append(set(addresses)))

    def of(self, address: IPAddress) -> NextHop:
        hop = self.hops.current()[address]
        assert isinstance(hop, NextHop), hop
        return hop

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(8):
            while not condition():  # noqa: ASYNC110 - the kernel sets no Event
                await asyncio.sleep(0.02)

    async def until_resolved(self, *addresses: IPAddress) -> None:
        await self.until(lambda: all(self.of(a).dmac is not None for a in addresses))


@asynccontextmanager
async def watched(here: Namespace, *addresses: IPAddress) -> AsyncIterator[Watched]:
    it = Watched(here)
    it.hops.start()
    try:
        it.hops.want(addresses)
        yield it
    finally:
        await it.hops.close()


def run(scenario: Coroutine[None, None, None]) -> None:
    asyncio.run(scenario)


def mac_of(namespace: Namespace) -> bytes:
    with namespace.inside(), Netlink() as netlink:
        return netlink.link("eth0").mac


def test_resolved_on_the_link_by_a_gateway_and_in_both_families(
    pair: tuple[Namespace, Namespace],
) -> None:
    here, there = pair

    async def scenario() -> None:
        async with watched(here, A, SIX, FAR) as it:
            await it.until_resolved(A, SIX, FAR)
            hop = it.of(A)
            assert (hop.dmac, hop.smac, hop.mtu) == (mac_of(there), mac_of(here), 1500)
            assert (hop.via, hop.gateway, hop.saddr) == (A, False, ip_address("10.9.0.1"))
            assert it.of(SIX).saddr == ip_address("fd09::1")
            assert (it.of(FAR).via, it.of(FAR).gateway) == (A, True)
            assert it.of(FAR).key == it.of(A).key
            assert it.hops.problems() == {}

    run(scenario())


def test_a_mac_that_changes_touches_its_users_only(pair: tuple[Namespace, Namespace]) -> None:
    here, _ = pair

    async def scenario() -> None:
        async with watched(here, A, B, FAR) as it:
            await it.until_resolved(A, B, FAR)
            it.told.clear()
            here.ip(f"neigh replace 10.9.0.2 lladdr {NEW_MAC} dev eth0 nud permanent")
            await it.until(lambda: bool(it.told))
            assert it.told == [{A, FAR}]
            assert it.of(A).dmac == it.of(FAR).dmac == bytes.fromhex(NEW_MAC.replace(":", ""))

    run(scenario())


def test_without_a_carrier_nobody_is_asked_for(
    pair: tuple[Namespace, Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry that was asked for meanwhile would take seconds to fail, and fail what waits."""
    here, there = pair
    there.sysctl({"ipv6.conf.all.keep_addr_on_down": 1})
    gone: set[IPAddress] = set()

    async def scenario() -> None:
        async with watched(here, A, SIX) as it:
            hops, hear = it.hops, it.hops._hear

            def overhear(event: Event) -> list[IPAddress]:
                if isinstance(event, NeighbourChanged) and event.gone:
                    gone.add(event.neighbour.address)
                return hear(event)

            monkeypatch.setattr(hops, "_hear", overhear)
            await it.until_resolved(A, SIX)
            there.ip("link set dev eth0 down")
            await it.until(lambda: {A, SIX} <= gone)
            await it.until(
                lambda: not hops._dirty and hops._refreshing is not None and hops._refreshing.done()
            )
            with here.inside(), Netlink() as netlink:
                for address in (A, SIX):
                    assert neighbours.find(netlink, it.of(A).ifindex, address) is None
            there.ip("link set dev eth0 up")
            await it.until_resolved(A, SIX)

    run(scenario())


def test_who_does_not_answer_is_reported_and_found_when_it_comes(
    pair: tuple[Namespace, Namespace],
) -> None:
    here, there = pair

    async def scenario() -> None:
        async with watched(here, A, NOBODY) as it:
            await it.until_resolved(A)
            await it.until(lambda: "failed" in str(it.hops.problems().get(NOBODY)))
            assert "backend 10.9.0.9 does not answer on eth0" in str(it.hops.problems()[NOBODY])
            assert it.hops.problems().keys() == {NOBODY}
            it.told.clear()
            # The kernel itself tries again, every few seconds (delay_first_probe_time).
            there.ip("addr add 10.9.0.9/24 dev eth0")
            await it.until(lambda: it.of(NOBODY).dmac is not None)
            assert it.told == [{NOBODY}]
            assert it.hops.problems() == {}

    run(scenario())


def test_routes_links_and_addresses_that_change(pair: tuple[Namespace, Namespace]) -> None:
    here, _ = pair

    async def scenario() -> None:
        async with watched(here, A, FAR) as it:
            await it.until_resolved(A, FAR)
            it.told.clear()
            here.ip("route replace 10.20.0.0/16 via 10.9.0.3 mtu 1400")
            await it.until(lambda: it.of(FAR).via == B)
            await it.until_resolved(FAR)
            assert it.of(FAR).mtu == 1400
            assert set().union(*it.told) == {FAR}
            here.ip("link set dev eth0 mtu 1380")
            await it.until(lambda: it.of(A).mtu == it.of(FAR).mtu == 1380)
            here.ip(f"link set dev eth0 address {NEW_MAC}")
            await it.until(lambda: it.of(A).smac.hex(":") == NEW_MAC)
            here.ip(
                "addr add 10.9.0.77/24 dev eth0",
                "route replace 10.20.0.0/16 via 10.9.0.2 src 10.9.0.77",
            )
            await it.until(lambda: it.of(FAR).saddr == ip_address("10.9.0.77"))
            here.ip("route del 10.20.0.0/16")
            await it.until(lambda: isinstance(it.hops.current()[FAR], ShuntError))
            assert "no route to 10.20.0.7" in str(it.hops.problems()[FAR])
            here.ip("route add 10.20.0.0/16 via 10.9.0.2")
            await it.until(lambda: isinstance(it.hops.current()[FAR], NextHop))

    run(scenario())


def test_a_link_that_goes_down_and_comes_back(pair: tuple[Namespace, Namespace]) -> None:
    here, _ = pair

    async def scenario() -> None:
        async with watched(here, A, SIX) as it:
            await it.until_resolved(A, SIX)
            here.ip("link set dev eth0 down")
            await it.until(lambda: isinstance(it.hops.current()[A], ShuntError))
            here.ip("link set dev eth0 up", "addr replace fd09::1/64 dev eth0 nodad")
            await it.until(lambda: it.hops.problems() == {})
            assert it.of(A).dmac is not None
            assert it.of(SIX).dmac is not None

    run(scenario())


def test_an_entry_that_somebody_deletes_is_made_again(pair: tuple[Namespace, Namespace]) -> None:
    here, _ = pair

    async def scenario() -> None:
        async with watched(here, A) as it:
            await it.until_resolved(A)
            here.ip("neigh del 10.9.0.2 dev eth0")

            def back() -> bool:
                with here.inside(), Netlink() as netlink:
                    entry = neighbours.find(netlink, it.of(A).ifindex, A)
                return entry is not None and entry.managed and entry.usable_mac is not None

            await it.until(back)
            await it.until_resolved(A)

    run(scenario())


def test_neighbours_are_released_when_nobody_wants_them(
    pair: tuple[Namespace, Namespace],
) -> None:
    here, _ = pair

    def managed() -> set[IPAddress]:
        with here.inside(), Netlink() as netlink:
            return {n.address for n in neighbours.all_of(netlink) if n.managed and n.ours}

    async def scenario() -> None:
        async with watched(here, A, B, FAR) as it:
            assert managed() == {A, B}
            it.hops.want([FAR])
            assert managed() == {A}
            it.hops.want([FAR, B])
            assert managed() == {A, B}
            here.ip("route replace 10.20.0.0/16 via 10.9.0.4")
            await it.until(lambda: managed() == {ip_address("10.9.0.4"), B})
        # Gone without a word: packets still need them.
        assert managed() == {ip_address("10.9.0.4"), B}
        # Whoever comes next takes over what it wants and releases the rest.
        async with watched(here, B) as it:
            assert managed() == {B}
            assert it.of(B).dmac is not None

    run(scenario())


def test_a_full_neighbour_table_says_so_and_is_tried_again(
    pair: tuple[Namespace, Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table's limit is the whole machine's, not a namespace's: nothing to fill up in a test.
    So this one answer of the kernel is put in its mouth."""
    here, _ = pair
    monkeypatch.setattr(nexthops, "RETRY_S", 0.1)

    async def scenario() -> None:
        async with watched(here, A) as it:
            await it.until_resolved(A)
            asked = []
            keep = neighbours.keep

            def refuse(netlink: Netlink, ifindex: int, address: IPAddress) -> None:
                asked.append(address)
                raise OSError(105, "No buffer space available")

            monkeypatch.setattr(neighbours, "keep", refuse)
            it.hops.want([A, B])
            error = it.hops.problems()[B]
            assert "table is full" in error.why
            assert "gc_thresh3" in error.fix
            monkeypatch.setattr(neighbours, "keep", keep)
            await it.until(lambda: isinstance(it.hops.current()[B], NextHop))
            assert asked == [B]

    run(scenario())
