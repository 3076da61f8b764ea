# SPDX-License-Identifier: Apache-2.0
"""A backend with decap on its interface, and the load balancer's end of the cable."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shunt.lab.netns import Namespace, veth
from shunt.lb.errors import ShuntError

DEVICE = "eth0.9"  # a dot, as a VLAN's interface has: no name that bpffs takes
BALANCER_MAC, BACKEND_MAC = "02:00:00:00:09:01", "02:00:00:00:09:02"
VIP = {4: "203.0.113.1", 6: "2001:db8:a::1"}


@contextlib.contextmanager
def backend_and_balancer() -> Iterator[tuple[Namespace, Namespace]]:
    """(balancer, backend), on one cable; test_decap.py draws them."""
    with contextlib.ExitStack() as stack:
        made = []
        for role in ("balancer", "backend"):
            namespace = Namespace.create(f"shunt-test-{os.getpid()}-{role}")
            stack.callback(namespace.delete)
            made.append(namespace)
        balancer, backend = made
        veth(balancer, "eth0", backend, DEVICE, 1500)
        balancer.ip(f"link set dev eth0 address {BALANCER_MAC}")
        backend.ip(
            f"link set dev {DEVICE} address {BACKEND_MAC}",
            f"address add 10.9.0.2/24 dev {DEVICE}",
            f"address add fd09::2/64 dev {DEVICE} nodad",
            f"address add {VIP[4]}/32 dev lo",
            f"address add {VIP[6]}/128 dev lo nodad",
            *(
                f"neighbour add {gateway} lladdr {BALANCER_MAC} nud permanent dev {DEVICE}"
                for gateway in ("10.9.0.1", "fd09::1")
            ),
            "route add default via 10.9.0.1",
            "route add default via fd09::1",
        )
        # An IPv6 address is this host's only once the device's carrier has been noticed.
        deadline = time.monotonic() + 5
        while "local" not in backend.run("ip", "route", "get", "fd09::2", check=False).stdout:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield balancer, backend


def refused(pair: Any, call: Callable[[], object]) -> ShuntError:
    with pair[1].inside(), pytest.raises(ShuntError) as caught:
        call()
    assert caught.value.what
    assert caught.value.why
    assert caught.value.fix
    return caught.value
