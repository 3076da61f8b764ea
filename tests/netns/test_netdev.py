# SPDX-License-Identifier: Apache-2.0
"""What drivers say, on veth pairs.

```
    here: eth0 ------ eth0 :there
          pair0 -- pair1
```
"""

import os
from collections.abc import Iterator

import pytest

from shunt.kern import netdev
from shunt.kern.netlink import Netlink
from shunt.lab.netns import Namespace, veth


@pytest.fixture
def pair() -> Iterator[tuple[Namespace, Namespace]]:
    here = Namespace.create(f"shunt-nd-{os.getpid()}-here")
    try:
        there = Namespace.create(f"shunt-nd-{os.getpid()}-there")
        try:
            veth(here, "eth0", there, "eth0", 1500)
            here.ip("link add name pair0 type veth peer name pair1")
            yield here, there
        finally:
            there.delete()
    finally:
        here.delete()


def test_driver_and_offloads(pair: tuple[Namespace, Namespace]) -> None:
    here, _ = pair
    with here.inside(), Netlink() as netlink:
        links = {link.name: link for link in netlink.links().values()}
        assert netdev.driver("eth0") == "veth"
        assert netdev.driver("lo") == ""
        assert netdev.device(links["eth0"]).offloads.isdisjoint({"tx", "tso", "gso", "gro"})
        assert netdev.device(links["pair0"]).offloads >= {"tx", "tso", "gso", "rx"}
        here.run("ethtool", "-K", "pair0", "tx", "off", "gro", "on")
        found = netdev.offloads("pair0")
        assert "tx" not in found
        assert "gro" in found
        with pytest.raises(OSError, match="No such device"):
            netdev.driver("eth9")


def test_xdp_sends_to_a_veth_only_if_its_peer_polls(pair: tuple[Namespace, Namespace]) -> None:
    here, there = pair
    with here.inside(), Netlink() as netlink:
        eth0 = netlink.link("eth0")
        acts = netdev.xdp_acts(eth0.ifindex)
        if acts is None:
            pytest.skip("needs xdp_features: since Linux 6.3")
        assert acts & netdev.XDP_ACT_BASIC
        assert not acts & netdev.XDP_ACT_NDO_XMIT
        there.run("ethtool", "-K", "eth0", "gro", "on")
        acts = netdev.xdp_acts(eth0.ifindex)
        assert acts is not None
        assert acts & netdev.XDP_ACT_NDO_XMIT
        assert netdev.xdp_acts(9999) is None


def test_a_veths_other_end(pair: tuple[Namespace, Namespace]) -> None:
    here, there = pair
    with there.inside(), Netlink() as netlink:
        mac = netlink.link("eth0").mac
    with here.inside(), Netlink() as netlink:
        links = {link.name: link for link in netlink.links().values()}
        peer = netdev.veth_peer(links["eth0"])
        assert peer is not None
        assert (peer.namespace, peer.link.name, peer.link.mac) == (there.name, "eth0", mac)
        peer = netdev.veth_peer(links["pair0"])
        assert peer is not None
        assert (peer.namespace, peer.link.name) == ("", "pair1")
        # And the thread is where it was.
        assert {link.name for link in netlink.links().values()} == set(links)
        with Netlink() as again:
            assert {link.name for link in again.links().values()} == set(links)
