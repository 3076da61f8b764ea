# SPDX-License-Identifier: Apache-2.0
"""`shunt doctor`: what is right, doubtful or wrong about a node that runs shuntd.

Every finding is a pure function of the facts, and its fix a command to paste. What a backend
needs is judged in doctor_backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from shunt.agent.facts import BalancerFacts, DeviceFacts
from shunt.agent.nat_ports import overlap, wanted
from shunt.agent.nexthops import NextHop
from shunt.agent.reach import unfit
from shunt.kern.netdev import XDP_ACT_BASIC, XDP_ACT_NDO_XMIT, Device
from shunt.kern.netlink import pick, ports
from shunt.lb.errors import ShuntError
from shunt.lb.model import Configuration, IPAddress, Mode
from shunt.lb.sizes import by_memory
from shunt.xdp.attach import PROGRAM

# What a client on the Internet sends at most.
CLIENT_PACKET_MAX = 1500
WANTED_BY_FEW = frozenset({"hook_compiler", "vlan", "bonding", "sctp"})


class Level(StrEnum):
    """How bad it is: ok, warn (works, with a limit), error (does not work)."""

    OK = "ok"
    WARN = "warn"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `check` names it; `fix` is a command."""

    level: Level
    check: str
    what: str
    why: str = ""
    fix: str = ""


# The modes that put headers in front of packets.
TUNNELS = frozenset({Mode.DSR_IPIP, Mode.DSR_GENEVE})


def outer_header_bytes(backend: IPAddress, mode: Mode = Mode.DSR_IPIP) -> int:
    """What a mode puts in front of a packet: an IP header of the backend's family; dsr-geneve also
    UDP, Geneve and its option."""
    geneve = 8 + 8 + 24 if mode is Mode.DSR_GENEVE else 0
    return (20 if backend.version == 4 else 40) + geneve


def check_balancer(facts: BalancerFacts, configuration: Configuration) -> list[Finding]:
    """Everything there is to say about this node, in the order in which to read it."""
    return [
        *_features(facts),
        *_interfaces(facts, configuration),
        *_next_hops(facts, configuration),
        *_room(facts, configuration),
        _tables(facts, configuration),
        *_ports(facts, configuration),
        *_vips(facts, configuration),
    ]


def worst(findings: list[Finding]) -> Level:
    """The worst level among findings; ok if there are none."""
    order = [Level.OK, Level.WARN, Level.ERROR]
    return max((f.level for f in findings), key=order.index, default=Level.OK)


def _features(facts: BalancerFacts) -> Iterator[Finding]:
    for feature in facts.features:
        if feature.name == "ipip":  # a backend's matter
            continue
        if feature.present:
            yield Finding(Level.OK, feature.name, feature.why)
        elif feature.name in WANTED_BY_FEW:
            what = f"{feature.what}; to change that: {feature.fix}"
            yield Finding(Level.OK, feature.name, what)
        else:
            level = Level.ERROR if feature.needed else Level.WARN
            yield Finding(level, feature.name, feature.what, feature.why, feature.fix)


def _interfaces(facts: BalancerFacts, configuration: Configuration) -> Iterator[Finding]:
    settings = configuration.settings
    for name in settings.interfaces:
        try:
            link = pick(facts.links.values(), name)
        except ShuntError as error:
            yield Finding(Level.ERROR, f"interface {name}", error.what, error.why, error.fix)
            continue
        if not link.carrier:
            yield Finding(
                Level.WARN,
                f"interface {name}",
                f"{name} has no carrier",
                "nothing is at the other end of the cable, or the other end is down",
                f"ip link show dev {name}",
            )
        if name in facts.devices and settings.xdp_mode != "off":
            yield from program_findings(facts.devices[name], PROGRAM, settings.xdp_mode)
        for port in ports(link, facts.links):
            if port.name in facts.devices:
                yield from offload_findings(facts.devices[port.name])
    generic = settings.xdp_mode in {"generic", "off"}
    for device in facts.devices.values() if not generic else ():
        yield from _delivery(device)


def program_findings(facts: DeviceFacts, program: str, xdp_mode: str) -> Iterator[Finding]:
    """How `program` runs, or would run, on a device."""
    check, device = f"interface {facts.name}", facts.device
    if facts.program not in ("", program):
        yield Finding(
            Level.ERROR,
            check,
            f"{facts.name} already has XDP program {facts.program!r} ({facts.mode})",
            "an interface holds one XDP program",
            f"ip link set dev {facts.name} xdp off",
        )
        return
    if facts.program:
        yield Finding(Level.OK, check, f"{facts.name}: {program} is attached, {facts.mode}")
        native = facts.mode == "native"
    else:
        native = device.xdp is None or bool(device.xdp & XDP_ACT_BASIC)
    driver = device.driver or "no driver"
    if native or xdp_mode == "generic":
        known = "" if device.xdp is not None else " (the kernel does not tell if it has native XDP)"
        yield Finding(Level.OK, check, f"{facts.name} is up, driver {driver}{known}")
    else:
        yield Finding(
            Level.ERROR if xdp_mode == "native" else Level.WARN,
            check,
            f"{facts.name} has no native XDP, driver {driver}",
            "generic XDP runs after the kernel has made its packet: several times as slow",
            "take an interface whose driver has native XDP (`shunt doctor` says which)",
        )


def offload_findings(facts: DeviceFacts) -> Iterator[Finding]:
    """Offloads that hand XDP what is not the packet on the wire."""
    name, device = facts.name, facts.device
    check = f"offloads {name}"
    merging = sorted(device.offloads & {"lro", "rx-gro-hw"})
    if merging:
        yield Finding(
            Level.WARN,
            check,
            f"{name} merges packets in hardware ({', '.join(merging)})",
            "XDP sees the merged packet, which is larger than the MTU of the next hop",
            f"ethtool -K {name} " + " ".join(f"{offload} off" for offload in merging),
        )
    if device.driver == "virtio_net" and facts.mode != "native" and "rx" in device.offloads:
        yield Finding(
            Level.WARN,
            check,
            f"{name} accepts packets whose checksum is still to be filled in",
            "a neighbour on the same hypervisor sends them so, and they would be forwarded broken",
            f"ethtool -K {name} rx off",
        )
    if device.link.kind == "veth":
        yield from _veth(facts)
    elif not merging:
        yield Finding(Level.OK, check, f"{name}: no offload that hides packets from XDP")


def _veth(facts: DeviceFacts) -> Iterator[Finding]:
    name, peer = facts.name, facts.peer
    check = f"offloads {name}"
    if peer is None:
        yield Finding(
            Level.WARN,
            check,
            f"the other end of the veth {name} cannot be seen from here",
            "with its tx checksumming on, packets come with a checksum still to be filled in",
            "in its namespace: ethtool -K DEV tx off tso off gso off gro on",
        )
        return
    wrong = sorted(peer.offloads & {"tx", "tso", "gso"})
    where = peer.link.name + (f" in namespace {peer.namespace}" if peer.namespace else "")
    if wrong:
        yield Finding(
            Level.ERROR,
            check,
            f"{name}'s other end, {where}, leaves work to whoever receives ({', '.join(wrong)})",
            "packets come unsegmented and without checksum, and would be forwarded broken",
            at(peer, f"ethtool -K {peer.link.name} tx off tso off gso off"),
        )
    else:
        yield Finding(Level.OK, check, f"{name}'s other end, {where}, sends finished packets")


def _delivery(facts: DeviceFacts) -> Iterator[Finding]:
    """Does what XDP sends out of this device arrive?"""
    device, check = facts.device, f"sending {facts.name}"
    if device.xdp is None or facts.mode == "generic":
        return
    if device.xdp & XDP_ACT_NDO_XMIT:
        yield Finding(Level.OK, check, f"{facts.name} sends what XDP hands it")
    elif device.link.kind == "veth":
        fix = "in the namespace of its other end: ethtool -K DEV gro on"
        if facts.peer is not None:
            fix = at(facts.peer, f"ethtool -K {facts.peer.link.name} gro on")
        yield Finding(
            Level.ERROR,
            check,
            f"{facts.name} drops every frame that XDP sends",
            "its other end does not poll (NAPI): it has neither GRO nor an XDP program",
            fix,
        )
    else:
        yield Finding(
            Level.WARN,
            check,
            f"{facts.name} takes no frames from XDP programs on other interfaces",
            f"its driver, {device.driver or 'none'}, has no ndo_xdp_xmit now",
            f"route the backends by way of another interface, or `xdp: generic`; see: ip route"
            f" show dev {facts.name}",
        )


def _next_hops(facts: BalancerFacts, configuration: Configuration) -> Iterator[Finding]:
    modes: dict[IPAddress, set[Mode]] = {}
    for service in configuration.services:
        for backend in service.backends:
            modes.setdefault(backend.address, set()).add(service.mode)
    good = 0
    for address, hop in sorted(facts.hops.items(), key=lambda item: item[0].packed):
        error = hop if isinstance(hop, ShuntError) else None
        if isinstance(hop, NextHop):
            each = (unfit(mode, address, hop) for mode in sorted(modes.get(address, ())))
            error = next(filter(None, each), None)
        if error is not None:
            yield Finding(Level.ERROR, f"backend {address}", error.what, error.why, error.fix)
        good += error is None
    if good:
        yield Finding(Level.OK, "next hops", f"{good} backends have a route")


def _room(facts: BalancerFacts, configuration: Configuration) -> Iterator[Finding]:
    """Does the largest packet of a client fit with an outer header around it?"""
    tight: dict[tuple[str, int, int], int] = {}
    tunnelled: dict[IPAddress, int] = {}  # by how much
    for service in configuration.services:
        for backend in service.backends if service.mode in TUNNELS else ():
            outer = outer_header_bytes(backend.address, service.mode)
            tunnelled[backend.address] = max(outer, tunnelled.get(backend.address, 0))
    come_in = [
        link.mtu for link in facts.links.values() if link.name in configuration.settings.interfaces
    ]
    packet = min([CLIENT_PACKET_MAX, *come_in])
    for address, outer in tunnelled.items():
        hop = facts.hops.get(address)
        if isinstance(hop, NextHop) and hop.mtu < packet + outer:
            key = hop.device, hop.mtu, packet + outer
            tight[key] = tight.get(key, 0) + 1
    for (device, mtu, needed), backends in sorted(tight.items()):
        yield Finding(
            Level.WARN,
            f"mtu {device}",
            f"packets of {packet} bytes do not fit, wrapped, towards {backends} backends",
            f"the MTU there is {mtu}, {needed} are needed; larger packets get an ICMP error,"
            " which some clients never see",
            f"ip link set dev {device} mtu {needed}  # and on all hosts of that link; else let the"
            " backends announce a smaller MSS: `shunt doctor --backend` there says how",
        )
    if tunnelled and not tight:
        yield Finding(Level.OK, "mtu", f"packets of {packet} bytes fit, wrapped, to every backend")


def _tables(facts: BalancerFacts, configuration: Configuration) -> Finding:
    """How many flows there is room for, and who said so."""
    limits, sizes = configuration.settings.limits, by_memory(facts.memory_bytes)
    memory = f"by the memory of {facts.memory_bytes / 2**30:.0f} GB"
    flows, nat = f"{limits.flows:,} flows", f"{limits.nat:,} translations"
    of_flows, of_nat = (
        memory if have == wanted else "as written"
        for have, wanted in ((limits.flows, sizes.flows), (limits.nat, sizes.nat))
    )
    what = f"room for {flows} and {nat}, {of_nat}"
    if of_flows != of_nat:
        what = f"room for {flows}, {of_flows}, and {nat}, {of_nat}"
    return Finding(Level.OK, "tables", what)


def _ports(facts: BalancerFacts, configuration: Configuration) -> Iterator[Finding]:
    if not (nats := wanted(configuration)):
        return
    low, high = nats.start, nats.stop - 1
    ours = facts.local_ports
    both = set(ours) & set(nats) - facts.reserved_ports
    if both:
        yield Finding(
            Level.ERROR,
            "nat ports",
            f"{len(both)} of nat's ports {low}-{high} are also for this host's own connections",
            f"net.ipv4.ip_local_port_range is {ours.start}-{ours.stop - 1}: a"
            " health check could meet a client's translated flow",
            f"sysctl -w net.ipv4.ip_local_reserved_ports={_reserve(facts, low, high)}",
        )
    elif error := overlap(configuration, facts.addresses, facts.listeners):
        yield Finding(Level.WARN, "nat ports", error.what, error.why, error.fix)
    else:
        yield Finding(Level.OK, "nat ports", f"{low}-{high} are nobody else's")


def _reserve(facts: BalancerFacts, low: int, high: int) -> str:
    """What was reserved before, and nat's: the setting is replaced as a whole."""
    others = sorted(facts.reserved_ports - set(range(low, high + 1)))
    runs: list[tuple[int, int]] = []
    for port in others:
        if runs and runs[-1][1] == port - 1:
            runs[-1] = runs[-1][0], port
        else:
            runs.append((port, port))
    runs.append((low, high))
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in sorted(runs))


def _vips(facts: BalancerFacts, configuration: Configuration) -> Iterator[Finding]:
    vips = {vip for service in configuration.services for vip in service.vips}
    for vip in sorted(vips & facts.addresses, key=lambda a: a.packed):
        yield Finding(
            Level.WARN,
            f"vip {vip}",
            f"{vip} is an address of this host",
            "whenever the program is not attached, the host answers itself: with a reset",
            f"ip addr show to {vip}  # and `ip addr del` it, unless neighbours must find it by ARP",
        )
    if vips and not vips & facts.addresses:
        yield Finding(Level.OK, "vips", "no VIP is an address of this host")


def at(device: Device, command: str) -> str:
    """The command, to be pasted here, for a device that may be in another namespace."""
    if not device.namespace:
        return command
    return f"nsenter --net=/run/netns/{device.namespace} {command}"
