# SPDX-License-Identifier: Apache-2.0
"""Where a frame for each backend goes: interface, MACs, MTU, kept current from netlink.

`decide` and what stands above the class is pure; the class asks the kernel, listens, and tells
whoever wants to know which backends' next hops changed.
"""

from __future__ import annotations

import asyncio
import errno
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from shunt.kern import neighbours
from shunt.kern.events import Event, Events, NeighbourChanged, Resync, RouteChanged
from shunt.kern.neighbours import Neighbour
from shunt.kern.netlink import Link, Netlink, Route
from shunt.kern.routes import Answer, Routes
from shunt.lb.errors import ShuntError
from shunt.lb.model import IPAddress

# A router that restarts changes many routes at once; they are looked at together.
COALESCE_S = 0.05
# So many are resolved (some 15 us each) before others on the event loop get a turn.
BATCH = 200
# At most this share of the time goes into resolving, however often routes change.
SHARE = 0.2
# What the kernel refused for want of room is asked for again.
RETRY_S = 10.0
MTU_MAX = 0xFFFF


@dataclass(frozen=True, slots=True)
class NextHop:
    """What `struct nexthop_val` holds. dmac None: the neighbour is not resolved."""

    ifindex: int
    device: str
    via: IPAddress  # the gateway, or the backend itself
    gateway: bool
    smac: bytes
    mtu: int
    saddr: IPAddress | None  # this host's address towards it
    dmac: bytes | None = None
    port: int = 0  # frames leave by this ifindex, below the device's VLANs; 0: by the device
    tags: int = 0  # and have these tags there

    @property
    def key(self) -> tuple[int, IPAddress, IPAddress | None]:
        """Next hops with equal keys share an element of the map."""
        return self.way, self.via, self.saddr

    @property
    def way(self) -> int:
        """ifindex and tags as one word of `struct nexthop_val`."""
        return (self.port or self.ifindex) | self.tags << 32


def decide(route: Route, neighbour: Neighbour | None) -> NextHop | ShuntError:
    """The next hop that a route and its neighbour's entry make."""
    address, link = route.destination, route.link
    if route.local:
        return ShuntError(
            f"backend {address} is an address of this host",
            why="packets are sent out of an interface; none goes to a server on this host",
            fix="remove the backend here, or run it on another host",
        )
    if route.tunnel or not link.ethernet:
        kind = "a route that encapsulates" if route.tunnel else f"{link.name}, not Ethernet"
        return ShuntError(
            f"backend {address} cannot be sent to by way of {kind}",
            why="an XDP program writes Ethernet frames, past the kernel's tunnels",
            fix=f"route {address} by way of an Ethernet device",
        )
    return NextHop(
        ifindex=link.ifindex,
        device=link.name,
        via=route.next_hop,
        gateway=route.gateway is not None,
        smac=link.mac,
        mtu=min(route.mtu, MTU_MAX),
        saddr=route.source,
        dmac=neighbour.usable_mac if neighbour is not None else None,
        port=route.port,
        tags=route.tags,
    )


def unresolved(address: IPAddress, hop: NextHop, neighbour: Neighbour | None) -> ShuntError | None:
    """Why a next hop has no MAC, for people; None if it has."""
    if hop.dmac is not None:
        return None
    who = f"the gateway {hop.via} of backend {address}" if hop.gateway else f"backend {address}"
    state = neighbour.state_name if neighbour is not None else "none"
    asked = "ARP" if hop.via.version == 4 else "neighbour discovery"
    return ShuntError(
        f"{who} does not answer on {hop.device}",
        why=f"its neighbour entry is in state {state}: no reply to {asked}",
        fix=f"see that it is up and on this link (`ip neigh show {hop.via} dev {hop.device}`)",
    )


def shared(hops: Iterable[NextHop]) -> dict[tuple[int, IPAddress, IPAddress | None], NextHop]:
    """One next hop for each key. Of different routes' MTUs the smallest holds for all."""
    found: dict[tuple[int, IPAddress, IPAddress | None], NextHop] = {}
    for hop in hops:
        other = found.get(hop.key)
        if other is None or hop.mtu < other.mtu:
            found[hop.key] = hop
    return found


class NextHops:
    """The next hops of the wanted addresses, in the network namespace of the thread.

    `changed` is called on the event loop with the addresses whose next hop became another one by
    itself; not for what `want` does, whose caller knows. Where only a neighbour's MAC changed,
    `macs_changed` is called instead, if given: with one gateway that is every backend's.
    """

    def __init__(
        self,
        changed: Callable[[list[IPAddress]], None],
        coalesce_s: float = COALESCE_S,
        macs_changed: Callable[[], None] | None = None,
    ) -> None:
        self._changed, self._coalesce_s, self._macs_changed = changed, coalesce_s, macs_changed
        self._netlink = Netlink()
        try:
            # First listen, then look: nothing in between is missed.
            self._events = Events()
        except OSError:
            self._netlink.close()
            raise
        self._routes = Routes()
        self._current: dict[IPAddress, NextHop | ShuntError] = {}
        self._sorted: dict[int, list[IPAddress]] | None = None
        self._neighbours: dict[tuple[int, IPAddress], Neighbour | None] = {}
        self._users: dict[tuple[int, IPAddress], set[IPAddress]] = {}
        self._without: set[IPAddress] = set()  # those that have none
        self._dirty: set[IPAddress] = set()
        self._refused: set[IPAddress] = set()
        self._retry: asyncio.TimerHandle | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        # What a process before us had the kernel keep; `want` says what is still needed.
        self._left_over = {
            (n.ifindex, n.address) for n in neighbours.all_of(self._netlink) if n.ours and n.managed
        }

    def start(self) -> None:
        """Follow the kernel from now on, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._events.fileno(), self._listen)
        self._ask_again()

    async def close(self) -> None:
        """Stop following. Neighbours stay managed: packets go on while no agent runs."""
        if self._loop is not None:
            self._loop.remove_reader(self._events.fileno())
        if self._retry is not None:
            self._retry.cancel()
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        self._events.close()
        self._routes.close()
        self._netlink.close()

    def want(self, addresses: Iterable[IPAddress]) -> None:
        """Keep the next hops of these addresses and of no others; new ones are there on return."""
        wanted = set(addresses)
        self.change(wanted, self._current.keys() - wanted)

    def change(self, new: Iterable[IPAddress], gone: Iterable[IPAddress]) -> None:
        """Keep the next hops of these too, and of those no longer."""
        gone = [address for address in gone if address in self._current]
        for address in gone:
            self._unuse(address)
            self._refused.discard(address)
            self._without.discard(address)
            del self._current[address]
        if new := set(new).difference(self._current):
            self._current.update(self._resolve(list(new), self._netlink.links()))
        if new or gone:
            self._sorted = None
        self._release_unused()

    def current(self) -> Mapping[IPAddress, NextHop | ShuntError]:
        """The next hop of each wanted address, or why it has none."""
        return MappingProxyType(self._current)

    def get(self, address: IPAddress) -> NextHop | ShuntError | None:
        """The same for one address; None if it is not wanted."""
        return self._current.get(address)

    @property
    def complete(self) -> bool:
        """Whether every wanted address has a next hop."""
        return not self._without

    def problems(self) -> dict[IPAddress, ShuntError]:
        """What is wrong with whom: no way, or a neighbour that does not answer."""
        found: dict[IPAddress, ShuntError] = {}
        for address, hop in self._current.items():
            if isinstance(hop, ShuntError):
                found[address] = hop
            elif error := unresolved(address, hop, self._neighbours.get((hop.ifindex, hop.via))):
                found[address] = error
        return found

    def _listen(self) -> None:
        changed: list[IPAddress] = []
        for event in self._events.read():
            changed += self._hear(event)
        if changed and self._macs_changed is not None:
            self._macs_changed()
        elif changed:
            self._changed(changed)
        self._wake()

    def _ask_again(self) -> None:
        if self._loop is not None:
            self._retry = self._loop.call_later(RETRY_S, self._ask_again)
        self._dirty |= self._refused
        self._wake()

    def _wake(self) -> None:
        if self._dirty and (self._refreshing is None or self._refreshing.done()):
            self._refreshing = asyncio.ensure_future(self._refresh())

    def _hear(self, event: Event) -> list[IPAddress]:
        """Take an event in; whose next hop changed at once. What needs asking becomes dirty."""
        if isinstance(event, RouteChanged):
            addresses = self._in_order()[event.prefix.version]
            first = bisect_left(addresses, event.prefix.network_address)
            last = bisect_right(addresses, event.prefix.broadcast_address)
            self._dirty.update(addresses[first:last])
            return []
        if not isinstance(event, NeighbourChanged):
            if isinstance(event, Resync):
                self._neighbours.clear()
            self._dirty.update(self._current)
            return []
        neighbour = event.neighbour
        key = neighbour.ifindex, neighbour.address
        users = self._users.get(key)
        if not users:
            return []
        if event.gone or not neighbour.kept:
            # The kernel no longer looks after it: it must be asked to again.
            self._neighbours.pop(key, None)
            self._dirty |= users
            return []
        before, self._neighbours[key] = self._neighbours.get(key), neighbour
        if before is not None and before.usable_mac == neighbour.usable_mac:
            return []  # as it does every half minute, for each backend behind a gateway
        made: dict[int, tuple[NextHop, NextHop]] = {}
        return [a for a in sorted(users, key=int) if self._put(a, neighbour, made)]

    def _in_order(self) -> dict[int, list[IPAddress]]:
        if self._sorted is None:
            ordered = sorted(self._current, key=int)
            self._sorted = {v: [a for a in ordered if a.version == v] for v in (4, 6)}
        return self._sorted

    def _put(
        self, address: IPAddress, neighbour: Neighbour, made: dict[int, tuple[NextHop, NextHop]]
    ) -> bool:
        """A neighbour's new state, for one of its users. True if that changed something.

        `made`: what became of each next hop, so that those behind a gateway go on sharing one.
        """
        before = self._current[address]
        if isinstance(before, ShuntError) or before.dmac == neighbour.usable_mac:
            return False
        if id(before) not in made:
            made[id(before)] = before, replace(before, dmac=neighbour.usable_mac)
        self._current[address] = made[id(before)][1]
        return True

    async def _refresh(self) -> None:
        """Resolve what is dirty again, until nothing is."""
        loop = asyncio.get_running_loop()
        pause_s = self._coalesce_s
        while self._dirty:
            await asyncio.sleep(pause_s)
            began = loop.time()
            links = self._netlink.links()
            todo, self._dirty = self._dirty, set()
            while todo:
                batch = [todo.pop() for _ in range(min(BATCH, len(todo)))]
                changed = self._again(batch, links)
                if changed:
                    self._changed(changed)
                await asyncio.sleep(0)
            self._release_unused()
            pause_s = max(self._coalesce_s, (loop.time() - began) * (1 / SHARE - 1))

    def _again(self, batch: Iterable[IPAddress], links: Mapping[int, Link]) -> list[IPAddress]:
        """Resolve these anew; those whose next hop became another one."""
        wanted = [address for address in batch if address in self._current]
        for address in wanted:
            self._unuse(address)
        changed = []
        for address, after in self._resolve(wanted, links).items():
            before, self._current[address] = self._current[address], after
            if isinstance(before, ShuntError) and isinstance(after, ShuntError):
                differs = str(before) != str(after)
            else:
                differs = before != after
            if differs:
                changed.append(address)
        return changed

    def _resolve(
        self, addresses: Sequence[IPAddress], links: Mapping[int, Link]
    ) -> dict[IPAddress, NextHop | ShuntError]:
        """The next hop of each address. Those behind one gateway share one object."""
        found: dict[IPAddress, NextHop | ShuntError] = {}
        # By the identity of an answer, which is held beside it: its own hash takes too long.
        behind: dict[int, tuple[Answer, NextHop, set[IPAddress]]] = {}
        if self._refused:
            self._refused.difference_update(addresses)
        for address, answer in self._routes.ask(addresses):
            if known := behind.get(id(answer)):
                found[address] = known[1]
                known[2].add(address)
                continue
            hop = found[address] = self._resolve_one(address, answer, links)
            if answer.gateway is not None and isinstance(hop, NextHop):
                behind[id(answer)] = answer, hop, self._users[hop.ifindex, hop.via]
        self._without.difference_update(found)
        self._without.update(a for a, hop in found.items() if isinstance(hop, ShuntError))
        return found

    def _resolve_one(
        self, address: IPAddress, answer: Answer, links: Mapping[int, Link]
    ) -> NextHop | ShuntError:
        try:
            link = links.get(answer.ifindex) if answer.ordinary else None
            # What is not a plain route is asked for again, in the form that says why not.
            route = (
                answer.route(address, link, links)
                if link
                else self._netlink.resolve(address, links)
            )
        except ShuntError as error:
            return error
        except OSError as error:
            self._refused.add(address)
            return _refused(f"the kernel gives no route to backend {address}", error)
        hop = decide(route, None)
        if isinstance(hop, ShuntError):
            return hop
        key = hop.ifindex, hop.via
        # Asked for without a carrier, it would go on failing for seconds once that is back.
        if self._neighbours.get(key) is None and route.link.carrier:
            try:
                self._neighbours[key] = neighbours.keep(self._netlink, *key)
            except OSError as error:
                self._refused.add(address)
                return _refused(f"the kernel does not look for {hop.via} on {hop.device}", error)
        self._users.setdefault(key, set()).add(address)
        return decide(route, self._neighbours.get(key))

    def _unuse(self, address: IPAddress) -> None:
        hop = self._current[address]
        if isinstance(hop, NextHop):
            self._users[hop.ifindex, hop.via].discard(address)

    def _release_unused(self) -> None:
        """Entries that we, or a process before us, made and nobody uses any more."""
        unused = {key for key, users in self._users.items() if not users}
        for key in unused | (self._left_over - self._users.keys()):
            neighbours.release(self._netlink, *key)
            self._users.pop(key, None)
            self._neighbours.pop(key, None)
        self._left_over.clear()


def _refused(what: str, error: OSError) -> ShuntError:
    if error.errno == errno.ENOBUFS:
        fix = "sysctl -w net.ipv{4,6}.neigh.default.gc_thresh3=8192"
        return ShuntError(what, why="the neighbour table is full", fix=fix)
    return ShuntError(what, why=f"{error.strerror} (errno {error.errno})", fix="see `ip neigh`")
