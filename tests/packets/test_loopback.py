# SPDX-License-Identifier: Apache-2.0
"""A VIP on this host's loopback is for its own processes: nothing may come for it over a wire."""

from __future__ import annotations

import pytest

from shunt.kern.libbpf import XDP_PASS
from tests.packets.balancer import TCP, Balancer, Reason
from tests.packets.frames import either
from tests.packets.translator import BACKENDS, CLIENT, NEXT, Translator

FAMILIES = pytest.mark.parametrize("ip", [4, 6])
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
NEXT_TO_IT = {4: "126.0.0.1", 6: "::2"}


@FAMILIES
def test_xdp_leaves_them_alone(lb: Balancer, ip: int) -> None:
    for vip in (LOOPBACK[ip], NEXT_TO_IT[ip]):
        lb.add_service(vip, 80, TCP, "nat", BACKENDS[ip])
    out = lb.run(either(TCP, CLIENT[ip], LOOPBACK[ip]))
    assert (out.verdict, out.reasons) == (XDP_PASS, {Reason.PASS_NOT_OURS: 1})
    out = lb.run(either(TCP, CLIENT[ip], NEXT_TO_IT[ip]))
    assert out.reasons == {Reason.SENT_TO_BACKEND: 1}


@FAMILIES
@pytest.mark.parametrize("mode", ["local", "nat"])
def test_tc_leaves_them_alone(ip: int, mode: str) -> None:
    with Translator() as tc:
        for vip in (LOOPBACK[ip], NEXT_TO_IT[ip]):
            tc.add_service(vip, 80, TCP, mode, BACKENDS[ip])
        packet = either(TCP, CLIENT[ip], LOOPBACK[ip])
        out = tc.run(packet)
        assert (out.verdict, out.reasons, out.data) == (NEXT, {}, bytes(packet))
        out = tc.run(either(TCP, CLIENT[ip], NEXT_TO_IT[ip]))
        assert out.reasons == {Reason.SENT_TO_BACKEND: 1}
