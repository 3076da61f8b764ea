# SPDX-License-Identifier: Apache-2.0
"""What a service asks for beyond balancing: affinity, source ranges, rates, redirection."""

from msgspec import UNSET

from shunt.lb.model import IPNetwork, Port, Protocol, RateLimit, SourceRule
from shunt.policy import sources

from . import values
from .shape import Rate, ServiceEntry
from .typed import Path, Reader, each

# A client's connections have so many bits of their hash in common, and a slot is chosen by them.
MOST_CLIENT_SLOTS = 1 << 20


def affinity_s(reader: Reader, path: Path, entry: ServiceEntry) -> float:
    """Seconds; 0 is none."""
    if entry.affinity == "none":
        return 0.0
    try:
        return values.duration(entry.affinity, "affinity")
    except values.Refused as error:
        reader.refuse((*path, "affinity"), error.what, error.wants, error.fix)
        return 0.0


def source_rules(reader: Reader, path: Path, entry: ServiceEntry) -> tuple[SourceRule, ...]:
    """The rules compiled; what is refused is noted and left out."""
    path = (*path, "sources")
    found: dict[str, dict[IPNetwork, Path]] = {}
    for name in ("allow", "deny"):
        found[name] = {}
        for where, text in each((*path, name), getattr(entry.sources, name)):
            try:
                found[name][values.any_network(text, "source")] = where
            except values.Refused as error:
                reader.refuse(where, error.what, error.wants, error.fix)
    try:
        return sources.compile_rules(*found.values())
    except sources.Contradiction as both:
        allowed = reader.place(found["allow"][both.network])
        reader.error(
            found["deny"][both.network],
            f"source {both.network} is denied and allowed",
            f"it is allowed at {allowed}",
            "remove one of the two",
        )
        return ()


def rate_limit(
    reader: Reader, path: Path, entry: ServiceEntry, ports: tuple[Port, ...]
) -> RateLimit | None:
    """Of new connections, if any is asked for."""
    if not isinstance(entry.rate, Rate) or entry.rate.connections is UNSET:
        return None
    if ports and not any(port.protocol.connects for port in ports):
        why = "it limits new connections, and the service has only UDP ports"
        reader.error((*path, "rate"), "rate limits nothing", why, "remove it")
    per_s = entry.rate.connections
    burst = entry.rate.burst if isinstance(entry.rate.burst, int) else max(1, round(per_s))
    return RateLimit(per_s, burst, entry.rate.prefix4, entry.rate.prefix6)


def redirects(reader: Reader, path: Path, entry: ServiceEntry, ports: tuple[Port, ...]) -> bool:
    """Whether streams between sockets of this node may pass TCP by."""
    asked = entry.redirect == "on"
    if asked and ports and not any(port.protocol is Protocol.TCP for port in ports):
        why = "it is for TCP, and the service has no TCP port"
        reader.error((*path, "redirect"), "redirect redirects nothing", why, "remove it")
    return asked


def check_hash(reader: Reader, path: Path, entry: ServiceEntry, slots: int) -> None:
    """Whether the clients' hash has bits enough for the service's slots."""
    if entry.hash == "client" and slots > MOST_CLIENT_SLOTS:
        what = f"hash: client with {slots} slots"
        why = f"a client's hash tells {MOST_CLIENT_SLOTS} slots apart"
        reader.error((*path, "hash"), what, why, "lower slots_per_backend, or use hash: tuple")
