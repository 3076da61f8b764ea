# SPDX-License-Identifier: Apache-2.0
"""Health checks by way of a VIP: the way is there while a service wants it, and what it is for
each check."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from shunt.agent.checks import Key
from shunt.agent.nexthops import NextHop, NextHops
from shunt.agent.probes.attempt import Target, Way
from shunt.agent.probes.sockets import own_address
from shunt.agent.tables import Tables
from shunt.agent.troubles import Troubles
from shunt.kern.netlink import InterfaceAddress, Netlink
from shunt.kern.objects import Program
from shunt.lb.compile import target_name
from shunt.lb.errors import ShuntError
from shunt.lb.model import Configuration, IPAddress, Protocol, Settings
from shunt.lb.slots import BACKEND_BITS
from shunt.xdp.check import CheckPath

log = logging.getLogger("shunt")

# What is in the way, as `shunt status` counts it.
NO_PROGRAM, LOCAL_VIP, NO_SOURCE, NOT_PLACED = "no-program", "local-vip", "no-source", "no-backend"

ADDRESSES_S = 5.0  # for so long this host's addresses are not asked for again


class Detour:
    """The way to each backend that clients' packets take, for checks from this host.

    What keeps checks from being made stands in `troubles`, which belongs to whoever shows it.
    """

    def __init__(self, tables: Tables, nexthops: NextHops, troubles: Troubles) -> None:
        self.tables, self.nexthops, self.troubles = tables, nexthops, troubles
        self._path: CheckPath | None = None
        self._settings: Settings | None = None
        self._addresses: list[InterfaceAddress] = []
        self._addresses_until_s = 0.0

    def follow(self, configuration: Configuration) -> None:
        """Have the way there if a service wants it. What the kernel refuses is told, and done
        without."""
        settings = configuration.settings
        wanted = {s.name for s in configuration.services if s.health and s.health.via == "vip"}
        self.troubles.forget_others("check", wanted)
        if bool(wanted) == (self._path is not None) and settings == self._settings:
            return
        self.close()
        self._settings = settings
        if not wanted:
            return
        try:
            self._path = CheckPath(self.tables.maps, settings)
        except (ShuntError, OSError) as e:
            self.troubles.tell(
                "checks",
                ShuntError(
                    "no check by way of a VIP can be made",
                    f"the kernel refuses what leads them there: {e}",
                    "see that it has sch_clsact, cls_bpf and policy routing, or remove `via: vip`",
                ),
            )

    @property
    def programs(self) -> list[Program]:
        """Those that are loaded."""
        return self._path.programs if self._path else []

    def close(self) -> None:
        """Take the way away."""
        self.troubles.tell("checks", None)
        if self._path is not None:
            path, self._path = self._path, None
            try:
                path.close()
            except OSError as e:
                log.warning("the way of checks through VIPs could not be taken away: %s", e)

    def ways(self, key: Key, target: Target) -> Sequence[Target] | str:
        """A target for each VIP, or what is in the way of all of them."""
        backend = self._backend(key)
        if self._path is None or self._settings is None:
            return NO_PROGRAM
        if not backend:
            return NOT_PLACED
        hop = self.nexthops.get(key[1].address)
        found = []
        for vip in target.vips:
            source = self._source(vip, hop if isinstance(hop, NextHop) else None)
            if source == vip:
                self._refuse_local(key[0], vip)
                return LOCAL_VIP
            if source is None:
                return NO_SOURCE
            way = Way(self._settings.check_mark << BACKEND_BITS | backend, source)
            found.append(replace(target, address=vip, vips=(), way=way))
        self.troubles.tell(f"check {key[0]}", None)
        return found

    def _backend(self, key: Key) -> int:
        """Its id; of any of its service's protocols, since it is reached alike in all. 0: none."""
        service, endpoint = key
        for protocol in Protocol:
            place = self.tables.placed.get(target_name(service, protocol))
            if place is not None and endpoint in place.backends:
                return place.backends[endpoint]
        return 0

    def _source(self, vip: IPAddress, hop: NextHop | None) -> IPAddress | None:
        """This host's address that a check is from: the VIP itself if it is this host's too."""
        own = own_address(vip)
        if own == vip or hop is None:
            return own
        if hop.saddr is not None and hop.saddr.version == vip.version:
            return hop.saddr
        return own or self._address_on(hop.ifindex, vip.version)

    def _address_on(self, ifindex: int, version: int) -> IPAddress | None:
        """One on the interface towards the backend: where nothing else leads to the VIP."""
        now_s = time.monotonic()
        if now_s > self._addresses_until_s:
            self._addresses_until_s = now_s + ADDRESSES_S
            with Netlink() as netlink:
                self._addresses = [a for a in netlink.addresses() if a.usable]
        for found in self._addresses:
            address = found.address
            ours = found.ifindex == ifindex and address.version == version
            if ours and not address.is_link_local:
                return address
        return None

    def _refuse_local(self, service: str, vip: IPAddress) -> None:
        self.troubles.tell(
            f"check {service}",
            ShuntError(
                f"service {service} is not checked: its VIP {vip} is an address of this host",
                "with via: vip a check is for the VIP, and the kernel would answer it here",
                f"take {vip} off this host (the balancer needs no VIP on an interface), or write"
                " via: backend",
            ),
        )
