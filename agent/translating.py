# SPDX-License-Identifier: Apache-2.0
"""The TC programs, there while a service needs them; and the ports that their replies come from."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Iterator
from itertools import chain

import numpy as np

from shunt.agent.apply import exclude_ports, sync_ports
from shunt.agent.handover import Handover
from shunt.agent.masquerading import Masquerading
from shunt.agent.nat_ports import others_here, wanted
from shunt.agent.own_addresses import OwnAddresses
from shunt.agent.tables import Tables
from shunt.lb.model import Configuration, Mode, Protocol, Service, Settings
from shunt.tc.translation import Translation
from shunt.xdp.attach import Datapath

log = logging.getLogger(__name__)
LOOK_EVERY_S = 5.0  # a millisecond, or some where there are tens of thousands of sockets


class Translating:
    """Between a configuration and the TC programs."""

    def __init__(self, datapath: Datapath, tables: Tables, own: OwnAddresses) -> None:
        self.datapath, self.tables, self.own = datapath, tables, own
        self.masquerading = Masquerading(datapath.maps, own.troubles)
        self.handover = Handover(datapath.maps, own.troubles)
        own.veths_changed = lambda: self.handover.sync(own.veths)
        self.translation = Translation(datapath.bpffs)
        self.needed = False
        self._looked_s = 0.0

    def prepare(self, configuration: Configuration, *, anew: bool) -> None:
        """Before the services are put in force: the first packet of one is translated.

        `anew`: the settings are others, or the maps are.
        Raises: ShuntError if the programs can't be loaded or attached.
        """
        self.needed = needed(configuration)
        self.follow(configuration)
        if not self.needed:
            return
        self._replies(configuration)
        sync_ports(self.tables, self.tables.nat_ports)
        if anew or not self.translation.loaded:
            self.translation.load(configuration.settings, self.datapath.maps)
            self.translation.attach(configuration.settings.interfaces)

    def follow(self, configuration: Configuration) -> None:
        """The addresses and devices of this host are others, perhaps, or the settings."""
        wanted = configuration.settings.masquerade
        self.masquerading.sync(wanted, self.own.ifindexes() if wanted else {}, self.own.held)
        peers = self.needed and configuration.settings.handover == "peer"
        self.handover.sync(self.own.watch_veths(peers))

    def settle(self, configuration: Configuration) -> None:
        """After that: take away what no service needs any more."""
        self._replies(configuration)
        sync_ports(self.tables, wanted(configuration))
        if not self.needed:
            self.translation.detach()

    def leave_out(self, settings: Settings, services: Iterable[Service]) -> None:
        """No new flow gets a port of this host's that is somebody else's now.

        `services`: with those of this host's addresses that are VIPs. If the kernel does not say
        who waits where, the ports left out stay as they are.
        """
        self._looked_s = time.monotonic()
        try:
            held = {found.address for found in self.own.held}
            ports, error = others_here(Configuration(settings, tuple(services)), held)
        except OSError as e:
            log.warning("cannot tell whose nat's ports are: %s", e)
            return
        exclude_ports(self.tables, ports)
        self.own.troubles.tell("nat ports", error)

    def look_again(self, settings: Settings, services: Iterable[Service]) -> None:
        """The same, if it is a while ago: processes come and go, and nobody tells of them."""
        if time.monotonic() - self._looked_s >= LOOK_EVERY_S:
            self.leave_out(settings, services)

    def close(self) -> None:
        """Let go; what is attached stays."""
        self.translation.close()

    def _replies(self, configuration: Configuration) -> None:
        both = chain(configured_ports(configuration), self._ports_in_force())
        self.tables.reply_ports = frozenset(both)

    def _ports_in_force(self) -> Iterator[tuple[Protocol, int]]:
        """Of the backends in the maps: one that was removed still has connections."""
        t = self.tables
        local = {*np.flatnonzero(t.svc["mode"] == int(t.modes["LOCAL"])).tolist()}
        for place in t.placed.values() if local else ():
            if place.svc not in local:
                continue
            protocol = Protocol(int(t.svc["proto"][place.svc]))
            for endpoint in place.backends:
                if endpoint.port:
                    yield protocol, endpoint.port
                else:
                    yield from ((protocol, frontend.port) for frontend in place.frontends)


def needed(configuration: Configuration) -> bool:
    """Whether TC translates (local and SCTP; all, if no XDP program does) or masquerades."""
    off = configuration.settings.xdp_mode == "off"
    return configuration.settings.masquerade is not None or any(
        is_at_tc(s.mode, s.protocols(), off)
        for s in configuration.services
        if s.mode is Mode.LOCAL or s.mode.translates  # few of thousands: protocols() takes long
    )


def is_at_tc(mode: Mode, protocols: Collection[Protocol], off: bool) -> bool:
    """Whether TC translates some of a service's protocols. `off`: no XDP program does."""
    return mode is Mode.LOCAL or (mode.translates and (off or Protocol.SCTP in protocols))


def configured_ports(configuration: Configuration) -> Iterator[tuple[Protocol, int]]:
    """The ports that backends on this node answer from."""
    for service in configuration.services:
        if service.mode is Mode.LOCAL:
            for port in service.ports:
                for backend in service.backends:
                    yield port.protocol, backend.port or port.port
