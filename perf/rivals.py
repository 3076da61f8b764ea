# SPDX-License-Identifier: Apache-2.0
"""What kube-proxy would write for the same services, in its nftables and its iptables layout.

Both name every backend in a chain of its own, every service in one that draws a backend at
random, and find the service by its address and port: nftables in one map, iptables by asking
rule after rule. Clients count as pods of the cluster, so that no source is translated; the
rules that ask for that are there.

Layout: kube-proxy of Kubernetes 1.33, modes nftables and iptables (ClusterIP services, TCP).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

PODS = "192.0.2.0/24"


@dataclass(frozen=True)
class Published:
    """A service of one port, which is its backends' too."""

    number: int
    vip: str
    port: int
    backends: Sequence[str]


def nftables(services: Iterable[Published]) -> str:
    """For `nft -f`."""
    return _NFT_HEAD + _nftables_of(services)


def nftables_in_parts(services: Iterable[Published], size: int) -> Iterator[str]:
    """The same for several runs of `nft -f`, each with so many services.

    The kernel looks for each anonymous map in the list of all that a transaction does: 100,000
    backends in a single one take minutes.
    """
    yield _NFT_HEAD
    left = iter(services)
    while part := list(islice(left, size)):
        yield _nftables_of(part)


def _nftables_of(services: Iterable[Published]) -> str:
    chains, elements, addresses = [], [], []
    for s in services:
        name = f"service-{s.number:08}-shop/shop-{s.number}/tcp/http"
        ends = [
            f"endpoint-{s.number:08}-shop/shop-{s.number}/tcp/http__{b}/{s.port}"
            for b in s.backends
        ]
        choice = ", ".join(f"{i} : goto {end}" for i, end in enumerate(ends))
        chains.append(
            f"chain {name} {{\n"
            f" ip daddr {s.vip} tcp dport {s.port} ip saddr != {PODS} jump mark-for-masquerade\n"
            f" numgen random mod {len(ends)} vmap {{ {choice} }}\n}}"
        )
        for backend, end in zip(s.backends, ends, strict=True):
            chains.append(
                f"chain {end} {{\n"
                f" ip saddr {backend} jump mark-for-masquerade\n"
                f" meta l4proto tcp dnat to {backend}:{s.port}\n}}"
            )
        elements.append(f"{s.vip} . tcp . {s.port} : goto {name}")
        addresses.append(s.vip)
    return (
        "table ip kube-proxy {\n"
        + "\n".join(chains)
        + "\n}\n"
        + f"add element ip kube-proxy cluster-ips {{ {', '.join(addresses)} }}\n"
        + f"add element ip kube-proxy service-ips {{ {', '.join(elements)} }}\n"
    )


_NFT_HEAD = """\
table ip kube-proxy {
set cluster-ips { type ipv4_addr; }
set nodeport-ips { type ipv4_addr; elements = { 192.0.2.1 }; }
map firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
map no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; }
map no-endpoint-nodeports { type inet_proto . inet_service : verdict; }
map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
map service-nodeports { type inet_proto . inet_service : verdict; }
chain mark-for-masquerade { mark set mark or 0x4000; }
chain masquerading {
 mark and 0x4000 == 0 return
 mark set mark xor 0x4000
 masquerade fully-random
}
chain firewall-check { ip daddr . meta l4proto . th dport vmap @firewall-ips; }
chain cluster-ips-check { ip daddr @cluster-ips reject; }
chain nodeport-endpoints-check {
 ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
}
chain service-endpoints-check {
 ip daddr . meta l4proto . th dport vmap @no-endpoint-services
}
chain filter-prerouting-pre-dnat {
 type filter hook prerouting priority dstnat - 10;
 ct state new jump firewall-check
}
chain filter-output-pre-dnat {
 type filter hook output priority -110;
 ct state new jump firewall-check
}
chain filter-input {
 type filter hook input priority filter;
 ct state new jump nodeport-endpoints-check
 ct state new jump service-endpoints-check
}
chain filter-forward {
 type filter hook forward priority filter;
 ct state new jump service-endpoints-check
 ct state new jump cluster-ips-check
}
chain filter-output {
 type filter hook output priority filter;
 ct state new jump service-endpoints-check
 ct state new jump cluster-ips-check
}
chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
chain nat-output { type nat hook output priority -100; jump services; }
chain nat-postrouting { type nat hook postrouting priority srcnat; jump masquerading; }
chain services {
 ip daddr . meta l4proto . th dport vmap @service-ips
 ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
}
}
"""


def iptables(services: Iterable[Published]) -> str:
    """For `iptables-restore`."""
    chains, first, rest = [], [], []
    for s in services:
        name, what = f"KUBE-SVC-{s.number:016}", f'"shop/shop-{s.number}:http"'
        to_vip = f"-d {s.vip}/32 -p tcp -m tcp --dport {s.port}"
        chains.append(f":{name} - [0:0]")
        comment = f'-m comment --comment "shop/shop-{s.number}:http cluster IP"'
        first.append(f"-A KUBE-SERVICES {comment} {to_vip} -j {name}")
        rest.append(f"-A {name} {comment} {to_vip} ! -s {PODS} -j KUBE-MARK-MASQ")
        for i, backend in enumerate(s.backends):
            end = f"KUBE-SEP-{s.number:014}{i:02}"
            left = len(s.backends) - i
            chance = f"-m statistic --mode random --probability {1 / left:.10f}"
            named = f"-m comment --comment {what}"
            chains.append(f":{end} - [0:0]")
            rest += [
                f"-A {name} {named} {chance if left > 1 else ''} -j {end}",
                f"-A {end} {named} -s {backend}/32 -j KUBE-MARK-MASQ",
                f"-A {end} {named} -p tcp -m tcp -j DNAT --to-destination {backend}:{s.port}",
            ]
    return "\n".join([_IPT_HEAD, *chains, _IPT_JUMPS, *first, _IPT_LAST, *rest, "COMMIT", ""])


_IPT_HEAD = """\
*filter
:KUBE-FORWARD - [0:0]
-A FORWARD -j KUBE-FORWARD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]"""

_IPT_JUMPS = """\
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully"""

_IPT_LAST = "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"
