# SPDX-License-Identifier: Apache-2.0
"""`shunt doctor --backend`: what a server needs to answer for a VIP itself (direct server return).

Pure functions of the facts, like doctor. In nat mode a backend needs nothing of this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shunt.agent.doctor import CLIENT_PACKET_MAX, Finding, Level, offload_findings
from shunt.agent.doctor_geneve import check_geneve
from shunt.agent.facts import BackendFacts
from shunt.kern.netlink import IFA_F_DADFAILED, InterfaceAddress, Link, Route
from shunt.lb.errors import ShuntError
from shunt.lb.model import IPAddress, Mode

DECAP_PROGRAM = "shunt_decap"
# Devices that take an outer header off, by the family of the VIP they can serve, with the module
# and the device that the module makes for packets from anybody.
TUNNEL_KINDS = {4: frozenset({"ipip", "ip6tnl"}), 6: frozenset({"ip6tnl", "sit"})}
MODULES = {4: ("ipip", "tunl0"), 6: ("ip6_tunnel", "ip6tnl0")}
# arp_ignore: 1, 2: only for addresses of the device that was asked on; 8: for none.
ARP_QUIET = frozenset({"1", "2", "8"})
RPF_STRICT = "1"


def check_backend(
    facts: BackendFacts, vips: Sequence[IPAddress], mode: Mode = Mode.DSR_IPIP
) -> list[Finding]:
    """What there is to say about this host as a backend for these VIPs."""
    if mode is Mode.NAT:
        return [Finding(Level.OK, "mode", "in mode nat a backend needs no setting")]
    findings: list[Finding] = []
    has_vip = mode is not Mode.DSR_GENEVE
    for vip in vips if has_vip else ():
        findings += _vip(facts, vip, mode)
    for version in sorted({vip.version for vip in vips}):
        findings += _way_back(facts, version)
        if mode is Mode.DSR_IPIP:
            findings += _unwraps(facts, version)
            findings += _room(facts, version)
    if mode is Mode.DSR_GENEVE:
        findings += check_geneve(facts, vips)
    if any(vip.version == 4 for vip in vips):
        findings += _arp(facts, mode) if has_vip else ()
        findings += _reverse_path(facts, mode)
    for device in facts.devices.values():
        if device.program == DECAP_PROGRAM:
            findings += offload_findings(device)
    return findings


def _vip(facts: BackendFacts, vip: IPAddress, mode: Mode) -> Iterator[Finding]:
    check, add = f"vip {vip}", f"ip addr add {vip}/{vip.max_prefixlen} dev lo"
    holders = [(facts.links[a.ifindex], a) for a in facts.addresses if a.address == vip]
    if not holders:
        yield Finding(
            Level.ERROR,
            check,
            f"{vip} is no address of this host",
            "packets for the VIP arrive unchanged: without the address the host drops them",
            add,
        )
        return
    wrong = False
    for link, address in holders:
        for finding in _holder(link, address, check, mode):
            wrong = True
            yield finding
    if not wrong:
        yield Finding(
            Level.OK, check, f"{vip} is on {', '.join(sorted(k.name for k, _ in holders))}"
        )


def _holder(link: Link, address: InterfaceAddress, check: str, mode: Mode) -> Iterator[Finding]:
    vip, length = address.address, address.prefix_length
    add = f"ip addr add {vip}/{vip.max_prefixlen} dev lo"
    quiet = link.loopback or link.kind == "dummy"
    remove = f"ip addr del {vip}/{length} dev {link.name}"
    if not quiet and link.ethernet:
        asked = "ARP" if vip.version == 4 else "neighbour discovery"
        # Fatal only where neighbours ask for the VIP: with dsr-ipip routers mostly don't.
        yield Finding(
            Level.ERROR if mode is Mode.DSR_L2 else Level.WARN,
            check,
            f"{vip} is on {link.name}, where the host answers {asked} for it",
            "the link's traffic for the VIP would come here past the load balancer",
            f"{remove} && {add}",
        )
    elif length != vip.max_prefixlen and link.loopback:
        yield Finding(
            Level.ERROR,
            check,
            f"{vip}/{length} on {link.name} makes its whole network this host's",
            f"every address of a prefix on {link.name} is local: clients in it get no answer",
            f"{remove} && {add}",
        )
    elif not link.up:
        yield Finding(
            Level.ERROR,
            check,
            f"{link.name}, which holds {vip}, is down",
            "addresses of a device that is down are not answered for",
            f"ip link set dev {link.name} up",
        )
    elif not address.usable:
        found = "found it elsewhere" if address.flags & IFA_F_DADFAILED else "is not done"
        yield Finding(
            Level.ERROR,
            check,
            f"{vip} on {link.name} is not in use",
            f"duplicate address detection {found}, and every backend has the VIP",
            f"{remove} && {add} nodad",
        )


def _way_back(facts: BackendFacts, version: int) -> Iterator[Finding]:
    route = facts.routes.get(version)
    check = f"replies IPv{version}"
    if isinstance(route, Route):
        way = f"by way of {route.gateway}" if route.gateway else "directly"
        yield Finding(Level.OK, check, f"clients are answered {way} on {route.link.name}")
        return
    yield Finding(
        Level.ERROR,
        check,
        f"no IPv{version} route back to clients",
        route.why if isinstance(route, ShuntError) else "the kernel was not asked for one",
        f"ip -{version} route add default via GATEWAY",
    )


def _unwrapping(facts: BackendFacts, version: int) -> list[str]:
    """Devices that take outer headers off for VIPs of this family."""
    tunnels = [
        k.name for k in facts.links.values() if k.up and k.kind in TUNNEL_KINDS[version]
    ]  # fmt: skip
    return sorted(tunnels) + _programs(facts)


def _programs(facts: BackendFacts) -> list[str]:
    return sorted(d.name for d in facts.devices.values() if d.program == DECAP_PROGRAM)


def _unwraps(facts: BackendFacts, version: int) -> Iterator[Finding]:
    check = f"decapsulation IPv{version}"
    found = _unwrapping(facts, version)
    if found:
        yield Finding(Level.OK, check, f"outer headers come off on {', '.join(found)}")
        return
    module, tunnel = MODULES[version]
    down = any(link.name == tunnel for link in facts.links.values())
    if down:
        fix = f"ip link set dev {tunnel} up"
    elif facts.ipip_module:
        fix = f"modprobe {module} && ip link set dev {tunnel} up"
    else:
        fix = f"shunt decap --iface {_towards_clients(facts, version)}"
    yield Finding(
        Level.ERROR,
        check,
        f"nothing takes the outer header off packets for IPv{version} VIPs",
        f"{tunnel} is down" if down else f"there is no {tunnel}, and no decap program is attached",
        fix,
    )


def _room(facts: BackendFacts, version: int) -> Iterator[Finding]:
    """Is the MSS that this host announces small enough for an outer header to fit?

    With direct server return the SYN-ACK never passes the load balancer, so that only this end
    can clamp.
    """
    route = facts.routes.get(version)
    if not isinstance(route, Route):
        return
    headers = 40 if version == 4 else 60
    outer = 40 if any(_is_global6(a) for a in facts.addresses) else 20
    mss = route.advmss or route.mtu - headers
    packet = min(mss + headers, CLIENT_PACKET_MAX)
    device = route.link
    if device.name in _programs(facts):
        yield Finding(Level.OK, f"mss IPv{version}", f"decap makes it fit on {device.name}")
        return
    if packet + outer <= device.mtu:
        yield Finding(Level.OK, f"mss IPv{version}", f"segments fit, wrapped, into {device.mtu}")
        return
    yield Finding(
        Level.WARN,
        f"mss IPv{version}",
        f"this host announces an MSS of {mss}: too large for an outer header of {outer} bytes",
        f"packets of {packet} bytes become {packet + outer}, and {device.name}'s MTU is"
        f" {device.mtu}; clients are told by ICMP, which some never see",
        _clamp(facts, route, version, device.mtu - outer - headers)
        or f"ip link set dev {device.name} mtu {packet + outer}  # and on all hosts of its link",
    )


def _clamp(facts: BackendFacts, route: Route, version: int, mss: int) -> str:
    """The command that repeats the route with a smaller MSS; empty if it has several hops."""
    entry = facts.entries.get(version)
    if entry is None:
        return ""
    prefix = "default" if entry.prefix.prefixlen == 0 else str(entry.prefix)
    words = [f"ip -{version} route change {prefix}"]
    if route.gateway is not None:
        family = "inet6 " if route.gateway.version != version else ""
        words.append(f"via {family}{route.gateway}")
    words.append(f"dev {route.link.name} table {entry.table} proto {entry.protocol}")
    if entry.metric:
        words.append(f"metric {entry.metric}")
    if entry.source is not None:
        words.append(f"src {entry.source}")
    if route.mtu != route.link.mtu:
        words.append(f"mtu {route.mtu}")
    return " ".join([*words, f"advmss {mss}"])


def _arp(facts: BackendFacts, mode: Mode) -> Iterator[Finding]:
    """The VIP is on `lo`; Linux would answer for it on every device, and ask in its name."""
    level = Level.ERROR if mode is Mode.DSR_L2 else Level.WARN
    wrong: set[str] = set()
    for name in facts.devices:
        if _strongest(facts, name, "arp_ignore") not in ARP_QUIET:
            # A larger number is not a stricter one here: the device's own would win.
            wrong |= {"all.arp_ignore=1", f"{_key(name)}.arp_ignore=1"}
        if _strongest(facts, name, "arp_announce") != "2":
            wrong.add("all.arp_announce=2")
    if not wrong:
        yield Finding(Level.OK, "arp", "the VIP is not answered for, nor asked with")
        return
    settings = " ".join(f"net.ipv4.conf.{setting}" for setting in sorted(wrong))
    yield Finding(
        level,
        "arp",
        "this host answers ARP for the VIP, or asks in its name",
        "neighbours would then send the VIP's traffic here, past the load balancer",
        f"sysctl -w {settings}",
    )


def _reverse_path(facts: BackendFacts, mode: Mode) -> Iterator[Finding]:
    """Packets of clients that come in where no answer would go out are dropped when strict."""
    route = facts.routes.get(4)
    out = route.link.name if isinstance(route, Route) else ""
    comes_in = [d.name for d in facts.devices.values()]
    if mode is Mode.DSR_IPIP:
        comes_in = _unwrapping(facts, 4)
    elif mode is Mode.DSR_GENEVE:
        comes_in = sorted(facts.geneve)
    strict = [n for n in comes_in if n != out and _strongest(facts, n, "rp_filter") == RPF_STRICT]
    for name in strict:
        yield Finding(
            Level.WARN if mode is Mode.DSR_L2 else Level.ERROR,
            f"rp_filter {name}",
            f"packets of clients that come in on {name} are dropped",
            f"rp_filter is strict there, and clients are answered on {out or 'no device'}",
            f"sysctl -w net.ipv4.conf.{_key(name)}.rp_filter=2",
        )
    if comes_in and not strict:
        yield Finding(Level.OK, "rp_filter", f"clients' packets pass on {', '.join(comes_in)}")


def _strongest(facts: BackendFacts, device: str, key: str) -> str:
    """The kernel takes the larger of `all` and the device's own, for each of these three."""
    values = [facts.sysctls.get(f"net.ipv4.conf.{name}.{key}") or "0" for name in ("all", device)]
    return max(values, key=int)


def _key(device: str) -> str:
    """A device's name within a key of sysctl(8), where dots part the words."""
    return device.replace(".", "/")


def _towards_clients(facts: BackendFacts, version: int) -> str:
    route = facts.routes.get(version)
    if isinstance(route, Route):
        return route.link.name
    return next(iter(sorted(facts.devices)), "DEV")


def _is_global6(address: InterfaceAddress) -> bool:
    """Could a load balancer reach this host over IPv6? (A VIP on `lo` does not say so.)"""
    known = address.address
    return known.version == 6 and address.prefix_length < 128 and not known.is_link_local
