# SPDX-License-Identifier: Apache-2.0
"""The addresses and the veth devices that this host has, kept current from netlink."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from shunt.agent.troubles import Troubles
from shunt.ipam.node import resolve, trouble
from shunt.kern.events import ADDRESSES, LINKS, Events
from shunt.kern.netlink import Netlink
from shunt.lb.model import IPAddress, Service

# An interface that comes up gets its addresses one after the other; they are looked at together.
COALESCE_S = 0.05
_TROUBLE = "addresses of"


class OwnAddresses:
    """In the network namespace of the thread. `changed` is called on the event loop, for a change
    after `start`; `veths_changed`, which can be set, for one of those devices alone, while somebody
    watches them. What a service asks for and has not got stands in `troubles`, which belongs to
    whoever shows it."""

    def __init__(self, changed: Callable[[], None], troubles: Troubles) -> None:
        self._changed, self.troubles = changed, troubles
        self.veths_changed: Callable[[], None] = lambda: None
        self.veths: frozenset[int] = frozenset()
        self._watches_veths = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: asyncio.TimerHandle | None = None
        self._netlink = Netlink()
        try:
            # First listen, then look: nothing in between is missed.
            self._events = Events(groups=(*ADDRESSES, *LINKS))
            self.held = self._netlink.addresses()
        except OSError:
            self._netlink.close()
            raise

    @property
    def current(self) -> frozenset[IPAddress]:
        """Without those that duplicate address detection forbids to use, or still may."""
        return frozenset(a.address for a in self.held if a.usable)

    def ifindexes(self) -> dict[str, int]:
        """Of every interface, by name."""
        return {link.name: link.ifindex for link in self._netlink.links().values()}

    def resolved(self, services: Iterable[Service]) -> dict[str, Service]:
        """The services, by name, with the addresses that they ask for."""
        found = {service.name: service for service in resolve(services, self.current)}
        self.troubles.forget_others(_TROUBLE, found)
        for name, service in found.items():
            self.troubles.tell(f"{_TROUBLE} {name}", trouble(service))
        return found

    def start(self) -> None:
        """Follow the kernel from now on, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._events.fileno(), self._listen)

    def close(self) -> None:
        """Stop following."""
        if self._loop is not None:
            self._loop.remove_reader(self._events.fileno())
        if self._waiting is not None:
            self._waiting.cancel()
        self._events.close()
        self._netlink.close()

    def _listen(self) -> None:
        if self._events.read() and self._waiting is None and self._loop is not None:
            self._waiting = self._loop.call_later(COALESCE_S, self._look_again)

    def _look_again(self) -> None:
        self._waiting = None
        before, self.held = self.held, self._netlink.addresses()
        veths_before, self.veths = self.veths, self._look_for_veths()
        if self.held != before:
            self._changed()
        if self.veths != veths_before:
            self.veths_changed()

    def watch_veths(self, wanted: bool) -> frozenset[int]:
        """Those that are up and lead into another namespace, from now on, or none any more.

        Shape: their ifindexes.
        """
        if wanted != self._watches_veths:
            self._watches_veths = wanted
            self.veths = self._look_for_veths()
        return self.veths

    def _look_for_veths(self) -> frozenset[int]:
        links = self._netlink.links().values() if self._watches_veths else ()
        return frozenset(
            link.ifindex
            for link in links
            if link.kind == "veth" and link.lower_nsid is not None and link.up
        )
