# SPDX-License-Identifier: Apache-2.0
"""The services the demo balances: every mode over both families, and the traffic to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from shunt.lab.reports import Plan, Target
from shunt.lab.servers import ECHO_PORT, HTTP_PORT
from shunt.lab.topology import Host
from shunt.lb.model import IPAddress, Mode

# Short, so that the demo need not wait long for a dead backend to be noticed.
HEALTH = {
    "type": "tcp",
    "port": HTTP_PORT,
    "interval": "500ms",
    "timeout": "400ms",
    "rise": 2,
    "fall": 2,
}


@dataclass(frozen=True)
class LabService:
    """A service of the lab; its backends' family is the VIP's, except when packets are wrapped."""

    name: str
    mode: Mode
    vip: IPAddress
    backend_version: int

    def document(self, backends: Sequence[Host]) -> dict[str, Any]:
        """As it stands in services.d."""
        return {
            "name": self.name,
            "mode": str(self.mode),
            "vip": str(self.vip),
            "ports": [HTTP_PORT, f"{ECHO_PORT}/tcp", f"{ECHO_PORT}/udp"],
            "backends": [str(host.addresses[self.backend_version == 6]) for host in backends],
            "health": HEALTH,
        }


SERVICES = (
    LabService("ipip-4in4", Mode.DSR_IPIP, ip_address("203.0.113.10"), 4),
    LabService("ipip-6in6", Mode.DSR_IPIP, ip_address("2001:db8:a::10"), 6),
    LabService("ipip-4in6", Mode.DSR_IPIP, ip_address("203.0.113.11"), 6),
    LabService("ipip-6in4", Mode.DSR_IPIP, ip_address("2001:db8:a::11"), 4),
    LabService("l2-v4", Mode.DSR_L2, ip_address("203.0.113.20"), 4),
    LabService("l2-v6", Mode.DSR_L2, ip_address("2001:db8:a::20"), 6),
    LabService("nat-v4", Mode.NAT, ip_address("198.51.100.30"), 4),
    LabService("nat-v6", Mode.NAT, ip_address("2001:db8:b::30"), 6),
)
NAT = frozenset(s.name for s in SERVICES if s.mode is Mode.NAT)


def dsr_vips(services: Sequence[LabService] = SERVICES) -> list[IPAddress]:
    """Those that backends must have on `lo`."""
    return [s.vip for s in services if not s.mode.readdresses]


def traffic_plan(services: Sequence[LabService] = SERVICES, tcp_flows: int = 200) -> Plan:
    """Short requests to every service, and this many connections in all."""
    each = tcp_flows // len(services)
    return Plan(
        targets=tuple(
            Target(
                name=s.name,
                address=str(s.vip),
                http_rate=10,
                udp_rate=8,
                tcp_flows=each,
                udp_flows=4,
                message_interval_s=0.5,
            )
            for s in services
        )
    )
