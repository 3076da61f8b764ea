# SPDX-License-Identifier: Apache-2.0
"""This host's ports for translations: how many are taken towards whom, and who else uses them.

A port is one flow's towards one destination: the address, port and protocol of a backend, or of
whom a masqueraded flow is for, and the address of this host that it sees. Towards another
destination the same port is free.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shunt.agent.nat_expiry import MASQUERADED
from shunt.agent.tables import Tables
from shunt.kern.sock_diag import SockDiag
from shunt.lb.compile import Endpoint, unmapped
from shunt.lb.errors import ShuntError
from shunt.lb.model import (
    ANY_PORT,
    PROTOCOL_NAMES,
    Configuration,
    Frontend,
    IPAddress,
    Protocol,
)

_ODD = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
Json = dict[str, Any]
_TCP_LISTEN, _UDP_UNCONNECTED = 0x0A, 0x07


class Destination(NamedTuple):
    """Towards whom, and from which of this host's addresses."""

    backend: Endpoint
    protocol: int  # as in IP's header: masqueraded pings take identifiers as others take ports
    own: IPAddress

    def __str__(self) -> str:
        return f"{self.backend}/{PROTOCOL_NAMES[self.protocol]} from {self.own}"


class PortUse:
    """How many ports are taken towards each destination."""

    def __init__(self) -> None:
        self._taken: Counter[int] = Counter()
        self._known: dict[int, Destination] = {}

    def add(self, keys: Any, values: Any) -> None:
        """Count some entries of nat_rev. Mode local's and SCTP's have their clients' ports."""
        ours = (values["back"]["ifindex"] != 0) & (values["handed"] == 0)
        ours |= (values["track"] & MASQUERADED) != 0
        keys = keys[ours & (keys["proto"] != Protocol.SCTP)]
        names, first, counts = np.unique(_names(keys), return_index=True, return_counts=True)
        for name, at, count in zip(names.tolist(), first.tolist(), counts.tolist(), strict=True):
            self._taken[name] += count
            if name not in self._known:
                self._known[name] = _destination(keys[at])

    def taken(self) -> dict[Destination, int]:
        """Ports taken, the busiest destination first."""
        return {self._known[name]: count for name, count in self._taken.most_common()}

    def busiest(self) -> tuple[Destination | None, int]:
        """Whom most ports are taken towards; None if there is no flow."""
        for name, count in self._taken.most_common(1):
            return self._known[name], count
        return None, 0


def _names(keys: Any) -> NDArray[np.uint64]:
    """A number for each destination, the same for the same."""
    raw = np.ascontiguousarray(keys)
    words = [raw[part].copy().view(np.uint64) for part in ("saddr", "daddr")]
    name = raw["sport"].astype(np.uint64) << np.uint64(8) | raw["proto"].astype(np.uint64)
    for word in words:
        for column in word.reshape(-1, 2).T:
            name = (name ^ column) * np.uint64(_ODD[0])
            name = (name ^ name >> np.uint64(29)) * np.uint64(_ODD[1])
    return name ^ name >> np.uint64(32)


def _destination(key: Any) -> Destination:
    backend = Endpoint(unmapped(key["saddr"].tobytes()), int(key["sport"]))
    return Destination(backend, int(key["proto"]), unmapped(key["daddr"].tobytes()))


def refused(tables: Tables) -> Iterator[tuple[Endpoint, int, int]]:
    """Whom flows were refused towards: address, port (0: the frontend's), protocol, count."""
    for i in np.flatnonzero(tables.nat_refused).tolist():
        record = tables.backends[i]
        if int(record["flags"]) & tables.flag.known:
            endpoint = Endpoint(unmapped(record["addr"].tobytes()), int(record["port"]))
            protocol = Protocol(int(tables.svc["proto"][int(record["svc"])]))
            yield endpoint, protocol, int(tables.nat_refused[i])
    for key, value in zip(*tables.maps["masq_refused"].items(), strict=True):
        endpoint = Endpoint(unmapped(key["addr"].tobytes()), int(key["port"]))
        yield endpoint, int(key["proto"]), int(value["flows"])


def top(tables: Tables, use: PortUse | None, limit: int) -> Json:
    """The destinations that ran out of ports, then those with most ports taken.

    Those taken are as the last scan found them.
    """
    ports = len(tables.nat_ports)
    taken = use.taken() if use else {}
    lost: Counter[Destination] = Counter()
    alone: Counter[tuple[Endpoint, int]] = Counter()
    for endpoint, protocol, count in refused(tables):
        for destination in taken:  # the busiest first
            if destination.protocol == protocol and _stands_for(endpoint, destination.backend):
                lost[destination] += count
                break
        else:
            alone[endpoint, protocol] += count
    rows = [
        _row(d.backend, d.protocol, str(d.own), taken[d], ports, lost[d])
        for d in sorted(taken, key=lambda d: (lost[d], taken[d]), reverse=True)
    ]
    rows += [_row(e, p, "", 0, ports, n) for (e, p), n in alone.most_common()]
    rows.sort(key=lambda row: (row["refused"], row["taken"]), reverse=True)
    return {"destinations": rows[:limit], "more": len(rows) > limit}


def _stands_for(endpoint: Endpoint, backend: Endpoint) -> bool:
    return endpoint.address == backend.address and endpoint.port in {0, backend.port}


def _row(backend: Endpoint, protocol: int, own: str, taken: int, ports: int, lost: int) -> Json:
    return {
        "backend": str(backend),
        "protocol": PROTOCOL_NAMES[protocol],
        "own": own,
        "taken": taken,
        "ports": ports,
        "share": round(taken / ports, 4) if ports else 0.0,
        "refused": lost,
    }


def listeners(ports: range) -> frozenset[tuple[Protocol, int]]:
    """On which of these ports of this thread's network namespace processes wait for others.

    Raises: OSError.
    """
    try:
        with SockDiag() as diag:
            return frozenset(
                (protocol, port)
                for protocol in (Protocol.TCP, Protocol.UDP)
                for port in diag.waiting(protocol, ports)
            )
    except FileNotFoundError:  # no inet_diag.ko, or no udp_diag.ko
        return frozenset(found for found in listed() if found[1] in ports)


def listed(proc: Path = Path("/proc/thread-self/net")) -> frozenset[tuple[Protocol, int]]:
    """The same of all ports, from text: seconds where there are tens of thousands of sockets."""
    found = set()
    for protocol, waiting in ((Protocol.TCP, _TCP_LISTEN), (Protocol.UDP, _UDP_UNCONNECTED)):
        for suffix in ("", "6"):
            table = proc / f"{protocol.name.lower()}{suffix}"
            for line in table.read_text().splitlines()[1:] if table.exists() else ():
                fields = line.split()
                if int(fields[3], 16) == waiting:
                    found.add((protocol, int(fields[1].rpartition(":")[2], 16)))
    return frozenset(found)


def wanted(configuration: Configuration) -> range:
    """Which of this host's ports replies come back to; none if nothing needs them."""
    settings = configuration.settings
    if not settings.masquerade and not any(s.mode.translates for s in configuration.services):
        return range(0)
    return range(settings.nat_port_min, settings.nat_port_max + 1)


def overlap(
    configuration: Configuration, addresses: Set[IPAddress], listening: Set[tuple[Protocol, int]]
) -> ShuntError | None:
    """Whether nat's ports are also a frontend's on this host's own addresses, or a listener's."""
    ports = wanted(configuration)
    both = sorted(
        f"frontend {frontend} of {name}"
        for name, frontend in _frontends(configuration, addresses)
        if frontend.port in ports
    )
    both += [
        f"a listener on {port}/{protocol.name.lower()}{_known_as(protocol, port)}"
        for protocol, port in sorted(listening, key=lambda found: found[1])
        if port in ports
    ]
    if not both:
        return None
    more = f" and {len(both) - 3} more" if len(both) > 3 else ""
    return ShuntError(
        f"nat's ports {ports.start}-{ports.stop - 1} are also others'",
        f"{', '.join(both[:3])}{more}: nat leaves these out, and has fewer; of those that a flow"
        " had before, a packet could be taken for a reply",
        "give nat ports of its own (`nat: {ports: FIRST-LAST}` in shunt.yaml), or move the others",
    )


def others(
    configuration: Configuration, addresses: Set[IPAddress], listening: Set[tuple[Protocol, int]]
) -> frozenset[tuple[Protocol, int]]:
    """Which of nat's ports those are, so that no flow gets them."""
    ports = wanted(configuration)
    served = {(f.protocol, f.port) for _, f in _frontends(configuration, addresses)}
    return frozenset((protocol, port) for protocol, port in served | listening if port in ports)


def _frontends(
    configuration: Configuration, addresses: Set[IPAddress]
) -> Iterator[tuple[str, Frontend]]:
    """On this host's own addresses, with a port: each with its service's name."""
    for service in configuration.services:
        if addresses.isdisjoint(service.vips):  # almost every one of thousands
            continue
        for frontend in service.frontends():
            if frontend.vip in addresses and frontend.port != ANY_PORT:
                yield service.name, frontend


def others_here(
    configuration: Configuration, addresses: Set[IPAddress]
) -> tuple[frozenset[tuple[Protocol, int]], ShuntError | None]:
    """The same two of this host as it is now; `addresses` are its own. Raises: OSError."""
    if not wanted(configuration):
        return frozenset(), None
    both = configuration, addresses, listeners(wanted(configuration))
    return others(*both), overlap(*both)


def _known_as(protocol: Protocol, port: int) -> str:
    try:
        return f" ({socket.getservbyport(port, protocol.name.lower())})"
    except OSError:
        return ""
