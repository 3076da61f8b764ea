# SPDX-License-Identifier: Apache-2.0
"""`shunt doctor --backend --mode dsr-geneve`: a server whose packets are for its own address.

Pure functions of the facts, like doctor. Such a server does not have the VIP: decap remembers who
has sent to which, and answers that leave by the same device get it as their source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shunt.agent.doctor import Finding, Level
from shunt.agent.facts import BackendFacts
from shunt.kern.netlink import Route
from shunt.lb.model import IPAddress


def check_geneve(facts: BackendFacts, vips: Sequence[IPAddress]) -> Iterator[Finding]:
    """Whether this host opens dsr-geneve for VIPs of these families, and answers where it does."""
    versions = sorted({vip.version for vip in vips})
    for version in versions:
        yield _opens(facts, version, versions)
    for version in versions:
        yield from _answers(facts, version)
    yield from _strangers(facts)


def _opens(facts: BackendFacts, version: int, versions: Sequence[int]) -> Finding:
    check = f"geneve IPv{version}"
    able = [n for n, own in facts.geneve.items() if any(a.version == version for a in own)]
    if able:
        return Finding(Level.OK, check, f"Geneve is opened on {', '.join(sorted(able))}")
    name = next(iter(sorted(facts.geneve)), _device(facts, version))
    given = facts.geneve.get(name, ())
    missing = [v for v in versions if all(a.version != v for a in given)]
    # All in one: a second command would replace the addresses of the first.
    addresses = [*map(str, given), *(_address(facts, name, v) for v in missing)]
    fix = " ".join([f"shunt decap --iface {name}", *(f"--address {a}" for a in addresses)])
    if given:
        what = f"decap on {name} was given no IPv{version} address"
        why = f"nothing stands for IPv{version} VIPs: their packets are dropped (drop-address)"
    else:
        what = f"nothing opens packets of dsr-geneve for IPv{version} VIPs"
        why = "no decap program is attached"
        if name in facts.geneve:
            why = f"decap is on {name}, but was given no address"
    return Finding(Level.ERROR, check, what, why, fix)


def _answers(facts: BackendFacts, version: int) -> Iterator[Finding]:
    """Only what leaves by a device with decap gets the VIP as its source."""
    route = facts.routes.get(version)
    opened = sorted(name for name, own in facts.geneve.items() if own)
    if not isinstance(route, Route) or not opened:
        return
    check, out = f"answers IPv{version}", route.link.name
    if out in opened:
        yield Finding(Level.OK, check, f"they get the VIP, and an MSS that fits, on {out}")
        return
    yield Finding(
        Level.ERROR,
        check,
        f"clients are answered on {out}, where nothing gives answers the VIP",
        f"packets are opened on {', '.join(opened)}, and each device remembers its own flows",
        f"ip -{version} route replace default via GATEWAY dev {opened[0]}",
    )


def _strangers(facts: BackendFacts) -> Iterator[Finding]:
    known = {address.address for address in facts.addresses}
    for name, own in sorted(facts.geneve.items()):
        for address in own:
            if address not in known:
                yield Finding(
                    Level.WARN,
                    f"address {address}",
                    f"decap on {name} opens packets for {address}, which is not this host's",
                    "the host routes them on, or drops them",
                    f"ip addr add {address}/{address.max_prefixlen} dev {name}",
                )


def _device(facts: BackendFacts, version: int) -> str:
    route = facts.routes.get(version)
    if isinstance(route, Route):
        return route.link.name
    return next(iter(sorted(facts.geneve or facts.devices)), "DEV")


def _address(facts: BackendFacts, device: str, version: int) -> str:
    for one in facts.addresses:
        link, address = facts.links[one.ifindex], one.address
        if link.name == device and address.version == version and not address.is_link_local:
            return str(address)
    return "ADDRESS"
