# SPDX-License-Identifier: Apache-2.0
"""What a mode asks of the way to a backend, beyond there being one. Pure."""

from __future__ import annotations

from shunt.agent.nexthops import NextHop
from shunt.lb.errors import ShuntError
from shunt.lb.model import IPAddress, Mode

PARTICULAR = frozenset({Mode.DSR_L2, Mode.NAT})  # the modes that ask for something


def unfit(mode: Mode | None, address: IPAddress, hop: NextHop) -> ShuntError | None:
    """Why a backend with this next hop is out of the reach of a mode; None if it is not."""
    if mode is Mode.DSR_L2 and hop.gateway:
        return _behind_gateway(address, hop)
    if mode is Mode.NAT and not _is_source(hop):
        return _no_source(address, hop)
    return None


def _is_source(hop: NextHop) -> bool:
    """Whether this host's address towards it can stand in clients' place."""
    return hop.saddr is not None and not (hop.saddr.is_link_local and hop.gateway)


def _no_source(address: IPAddress, hop: NextHop) -> ShuntError:
    family = f"IPv{address.version}"
    kept = f", but {hop.saddr}, which no router forwards" if hop.saddr is not None else ""
    return ShuntError(
        f"backend {address} cannot be reached from an address of this host",
        why=f"mode nat puts one of its {family} addresses in clients' place, and it has none{kept}",
        fix=f"give it one: ip addr add ADDRESS/PREFIX dev {hop.device}",
    )


def _behind_gateway(address: IPAddress, hop: NextHop) -> ShuntError:
    return ShuntError(
        f"backend {address} is behind the gateway {hop.via}, out of dsr-l2's reach",
        why="dsr-l2 changes the MAC alone: a gateway would route the packet to the VIP again",
        fix="put the backend on the same link, or use mode dsr-ipip",
    )
