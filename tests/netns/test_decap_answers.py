# SPDX-License-Identifier: Apache-2.0
"""Decap's program for answers, attached and taken away; settings changed while it runs.

test_decap.py draws the hosts.
"""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from shunt.kern import features, links, tc
from shunt.kern.maps import Map
from shunt.lab.netns import Namespace
from shunt.xdp import decap
from tests.netns import iproute
from tests.netns.decap_pair import DEVICE, refused


@pytest.fixture(params=["tcx", "clsact"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the program for answers is attached; the second as where the kernel has no TCX."""
    if request.param == "clsact":
        absent = replace(features.tcx(), present=False)
        monkeypatch.setattr(features, "tcx", lambda: absent)
    elif not features.tcx().present:
        pytest.skip("needs tcx: links came with 6.6")
    return str(request.param)


def qdiscs(backend: Namespace) -> set[str]:
    with backend.inside():
        return tc.qdiscs(socket.if_nametoindex(DEVICE))


def test_answers_have_a_program_of_their_own(way: str, pair: Any, attach: Any, bpffs: Path) -> None:
    before = qdiscs(pair[1])
    assert attach().answers == way
    assert attach(["10.0.0.0/8"]).answers == way  # swapped
    assert ("clsact" in qdiscs(pair[1])) == (way == "clsact")
    with pair[1].inside():
        index = socket.if_nametoindex(DEVICE)
        ours = tc.our_filters(index, tc.Direction.EGRESS, decap.ANSWER_PROGRAM)
        assert len(ours) == (way == "clsact")
        decap.detach(DEVICE, bpffs)
    assert qdiscs(pair[1]) == before
    assert list(bpffs.iterdir()) == []


def test_anothers_clsact_stays(pair: Any, attach: Any, bpffs: Path) -> None:
    iproute.run(pair[1], "tc", "qdisc", "add", "dev", DEVICE, "clsact")
    attach()
    with pair[1].inside():
        decap.detach(DEVICE, bpffs)
    assert "clsact" in qdiscs(pair[1])


def test_addresses_are_changed_and_flows_kept(pair: Any, bpffs: Path) -> None:
    with pair[1].inside():
        first = decap.attach(DEVICE, bpffs=bpffs, addresses=["10.9.0.2"], flows=100)
        assert (first.addresses, first.flows, first.flows_max) == (
            (ip_address("10.9.0.2"),),
            0,
            100,
        )
        with contextlib.closing(Map.pinned(next(bpffs.iterdir()) / decap.FLOWS)) as flows:
            key, value = flows.new_keys(1), flows.new_values(1)
            value["seen_ns"] = time.monotonic_ns()
            flows.update_many(key, value)
        both = ["10.9.0.2", "fd09::2", "10.9.0.2"]
        second = decap.attach(DEVICE, bpffs=bpffs, addresses=both)
        assert second.addresses == (ip_address("10.9.0.2"), ip_address("fd09::2"))
        assert (second.flows, second.flows_max) == (1, 100)
        assert decap.attach(DEVICE, bpffs=bpffs).addresses == ()
    error = refused(pair, lambda: decap.attach(DEVICE, bpffs=bpffs, flows=200))
    assert error.what == f"decap on {DEVICE} has room for 100 flows"
    error = refused(pair, lambda: decap.attach(DEVICE, bpffs=bpffs, addresses=["10.9.0.300"]))
    assert error.what == "10.9.0.300 is not an address of this host"
    nine = [f"10.9.0.{i}" for i in range(9)]
    error = refused(pair, lambda: decap.attach(DEVICE, bpffs=bpffs, addresses=nine))
    assert error.what == "9 IPv4 addresses are too many"


def test_what_a_killed_command_left_is_replaced(pair: Any, attach: Any, bpffs: Path) -> None:
    attach()
    (directory,) = bpffs.iterdir()
    with pair[1].inside():
        links.detach_pin(directory / decap.LINK)
        assert decap.status(bpffs) == []
    attach()
    assert list(bpffs.iterdir()) == [directory]
