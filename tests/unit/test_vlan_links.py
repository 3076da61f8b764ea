# SPDX-License-Identifier: Apache-2.0
"""What frames carry that leave by a VLAN device, and by which device they leave."""

from __future__ import annotations

import pytest

from shunt.kern.netlink import TAG_PROVIDER, Link, below_vlans


def link(
    ifindex: int, kind: str = "", lower: int = 0, vlan: int = 0, nsid: int | None = None
) -> Link:
    return Link(ifindex, f"d{ifindex}", b"\2" * 6, 1500, True, True, kind, False, lower, nsid, vlan)


LINKS = {
    x.ifindex: x
    for x in (
        link(1),
        link(2, "vlan", 1, 100),
        link(3, "vlan", 1, TAG_PROVIDER | 7),
        link(4, "vlan", 3, 100),
        link(5, "vlan", 4, 9),
        link(6, "vlan", 77, 9),
        link(7, "vlan", 1, 9, 3),
        link(8, "bond"),
        link(9, "vlan", 8, 30),
    )
}


@pytest.mark.parametrize(
    ("ifindex", "port", "tags"),
    [
        (1, 1, 0),
        (2, 1, 100),
        (3, 1, 0x1007),
        (4, 1, 0x1007 << 16 | 100),
        (5, 5, 0),  # three tags
        (6, 6, 0),  # the lower device is gone
        (7, 7, 0),  # or in another namespace
        (8, 8, 0),
        (9, 8, 30),
    ],
)
def test_below(ifindex: int, port: int, tags: int) -> None:
    assert below_vlans(LINKS[ifindex], LINKS) == (port, tags)
