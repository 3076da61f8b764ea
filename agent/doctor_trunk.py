# SPDX-License-Identifier: Apache-2.0
"""Devices above and below the attached one: VLAN devices and bonds. Pure, as all of doctor is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shunt.agent.doctor import Finding, Level, at
from shunt.agent.facts import BalancerFacts, DeviceFacts
from shunt.kern.netdev import Device
from shunt.kern.netlink import Link, ports
from shunt.lb.model import Configuration

LOST = (
    "XDP sees frames without their tag: replies of mode nat, and the balancer's own answers"
    " (echo, too big), leave untagged and are lost"
)


def check_trunks(facts: BalancerFacts, configuration: Configuration) -> list[Finding]:
    """What there is to say of each configured interface that has VLAN devices or is of a bond."""
    found: list[Finding] = []
    for name in configuration.settings.interfaces:
        link = next((link for link in facts.links.values() if link.name == name), None)
        if link is None:
            continue
        found += _slave(link, facts.links, configuration)
        above = sorted(other.name for other in facts.links.values() if _is_above(other, link))
        device = facts.devices.get(name)
        generic = configuration.settings.xdp_mode == "generic"
        generic |= device is not None and device.mode == "generic"
        if above and generic and link.kind == "bond":
            found.append(_generic(link, above, configuration))
        elif above:
            found += _tags(link, above, facts)
    return found


def _is_above(other: Link, link: Link) -> bool:
    return other.kind == "vlan" and other.lower == link.ifindex and other.lower_nsid is None


def _generic(link: Link, above: list[str], configuration: Configuration) -> Finding:
    names = ", ".join(_replaced(configuration, link.name, *above))
    return Finding(
        Level.WARN,
        f"vlan {link.name}",
        f"{link.name} is a bond in generic mode, and a trunk ({', '.join(above)})",
        "the kernel takes tags out of the frame before a bond's generic program sees it: what came"
        " with a tag keeps it on its way out and is lost",
        f"attach to the VLAN devices: interfaces: [{names}] in shunt.yaml; or have a bond that"
        " can be native (mode active-backup, 802.3ad, balance-xor or balance-rr)",
    )


def _tags(link: Link, above: list[str], facts: BalancerFacts) -> Iterator[Finding]:
    """Does XDP see the tags of a trunk? Each cable of a bond decides for itself."""
    check, good = f"vlan {link.name}", True
    for port in ports(link, facts.links):
        device = facts.devices.get(port.name)
        culprit = _takes_tags(device) if device is not None else None
        if culprit is None:
            continue
        good = False
        here = device is not None and culprit is device.device
        feature, does = ("rxvlan", "takes") if here else ("txvlan", "keeps")
        yield Finding(
            Level.WARN,
            check,
            f"{culprit.link.name} {does} VLAN tags out of the frame ({feature}), and"
            f" {link.name} is a trunk ({', '.join(above)})",
            LOST,
            at(culprit, f"ethtool -K {culprit.link.name} {feature} off"),
        )
    if good:
        yield Finding(Level.OK, check, f"{link.name}: tags of {', '.join(above)} stay in the frame")


def _takes_tags(facts: DeviceFacts) -> Device | None:
    """Who takes tags out of what comes in: the device, or the other end of a veth."""
    if facts.device.link.kind == "veth":
        return facts.peer if facts.peer is not None and "txvlan" in facts.peer.offloads else None
    return facts.device if "rxvlan" in facts.device.offloads else None


def _slave(
    link: Link, links: Mapping[int, Link], configuration: Configuration
) -> Iterator[Finding]:
    master = links.get(link.master)
    if master is None or master.kind != "bond":
        return
    names = ", ".join(_replaced(configuration, link.name, master.name))
    yield Finding(
        Level.WARN,
        f"interface {link.name}",
        f"{link.name} is a part of {master.name}, and the program sees its packets alone",
        f"what comes in by the other parts of {master.name}, after a failover everything, goes to"
        " this host's stack",
        f"attach to the bond: interfaces: [{names}] in shunt.yaml",
    )


def _replaced(configuration: Configuration, name: str, *instead: str) -> list[str]:
    """The configured interfaces, with others in one's place."""
    names = configuration.settings.interfaces
    return list(dict.fromkeys(new for n in names for new in (instead if n == name else (n,))))
