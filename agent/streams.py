# SPDX-License-Identifier: Apache-2.0
"""Between the configuration and the programs that redirect streams: which services'.

Connections are made with or without."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shunt.lb.compile import target_name
from shunt.lb.errors import ShuntError
from shunt.lb.model import Protocol

if TYPE_CHECKING:
    from shunt.agent.node import Node


def redirect(node: Node, *, anew: bool) -> None:
    """After the services are in force. What cannot be had is told; connections are TCP's then.

    `anew`: the maps or the programs that translate are others than before.
    """
    asked = [name for name, service in node.services.items() if service.redirect]
    placed = node.tables.placed
    names = [target_name(name, Protocol.TCP) for name in asked]
    services = {placed[name].svc for name in names if name in placed}
    peers, refused = node.sockets.peers(), None
    try:
        node.streams.follow(services, node.datapath.maps, peers, anew=anew)
        if services and peers is None:
            refused = ShuntError(
                f"no stream of {', '.join(sorted(asked))} is redirected",
                "connections are not translated at the socket, which is where both ends are seen",
                "set `sockets: host` or `sockets: all`, or remove `redirect`",
            )
    except ShuntError as e:
        refused = e
    node.observing.troubles.tell("redirect", refused)
