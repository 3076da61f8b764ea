# SPDX-License-Identifier: Apache-2.0
"""The packets that `shunt explain` makes, read by another library."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from scapy.layers.sctp import SCTP, SCTPChunkData, SCTPChunkInit

from shunt.cli.frames import PROTOCOLS, make
from tests.packets.frames import verify

ENDS = {4: ("192.0.2.1", "203.0.113.1"), 6: ("2001:db8:c::1", "2001:db8:a::1")}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("payload", [0, 1, 1000])
def test_lengths_and_checksums_are_right(version: int, protocol: str, payload: int) -> None:
    source, destination = (ip_address(address) for address in ENDS[version])
    frame = make((source, 40000), (destination, 80), protocol, ("syn",), payload)
    packet = verify(frame)
    assert (packet.payload.src, packet.payload.dst) == ENDS[version]
    if protocol != "icmp":
        assert (packet.payload.payload.sport, packet.payload.payload.dport) == (40000, 80)


@pytest.mark.parametrize("version", [4, 6])
def test_sctp_is_an_init_or_data(version: int) -> None:
    source, destination = (ip_address(address) for address in ENDS[version])
    first = verify(make((source, 1), (destination, 2), "sctp"))
    assert first[SCTP].tag == 0
    assert first[SCTPChunkInit].len == 20
    later = verify(make((source, 1), (destination, 2), "sctp", (), 5))
    assert later[SCTP].tag != 0
    assert bytes(later[SCTPChunkData].data) == bytes(5)
