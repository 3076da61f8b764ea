# SPDX-License-Identifier: Apache-2.0
"""Fragments of datagrams that are never whole."""

from __future__ import annotations

import socket

from shunt.lab.netns import Namespace
from tests.packets.frames import network, udp
from tests.packets.test_fragments import fragments_of


def send_part(sender: Namespace, source: str, to: str) -> None:
    """A later fragment, whose datagram's first one nobody sent."""
    part = fragments_of(udp(source, to, payload=bytes(3000)))[1]
    family = socket.AF_INET6 if ":" in to else socket.AF_INET
    with sender.inside(), socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.sendto(bytes(network(part)), (to, 0))
