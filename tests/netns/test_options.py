# SPDX-License-Identifier: Apache-2.0
"""Affinity, source ranges, rates and every port on a real shuntd, with real connections."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from shunt.lab.napi import attach_pass
from tests.netns.shunt_host import BACKENDS, CLIENT, Host, a_host

VIP = "203.0.113.20"
SERVICE: dict[str, Any] = {
    "name": "asked",
    "vip": VIP,
    "ports": [80],
    "mode": "nat",
    "backends": [f"{address}:8080" for address in BACKENDS],
    "health": "none",
}


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with a_host("options") as found:
        for file in found.services.iterdir():
            file.unlink()
        found.write("asked", SERVICE)
        found.start()
        link = attach_pass(found.outside, "eth0")  # what is translated arrives only then
        yield found
        os.close(link)


def ask(host: Host, **options: Any) -> None:
    """Put the service in force with these keys more."""
    host.write("asked", SERVICE | options)
    done = host.shunt("config", "reload")
    assert (done.code, done.err) == (0, "")


def connects(host: Host, port: int = 80, timeout_s: float = 2.0) -> bool:
    with host.outside.inside():
        client = socket.socket()
    with contextlib.closing(client):
        client.settimeout(timeout_s)
        client.bind((CLIENT, 0))
        try:
            client.connect((VIP, port))
        except TimeoutError:
            return False
        return True


def backends_of_connections(host: Host, count: int) -> set[str]:
    """Where so many new connections went."""
    before = {(f["client"], f["client_port"]) for f in host.json("nat", "list")}
    assert all(connects(host) for _ in range(count))
    new = [f for f in host.json("nat", "list") if (f["client"], f["client_port"]) not in before]
    assert len(new) == count
    return {f["backend"] for f in new}


def dropped(host: Host, reason: str) -> int:
    return int(host.json("status")["reasons"].get(reason, {"packets": 0})["packets"])


def test_affinity_is_switched_on_and_off_live(host: Host) -> None:
    """S49, S53."""
    ask(host)
    assert len(backends_of_connections(host, 16)) == 2
    ask(host, affinity="1h")
    assert len(backends_of_connections(host, 16)) == 1
    ask(host)
    assert len(backends_of_connections(host, 16)) == 2


def test_a_denied_client_is_dropped_until_it_is_allowed(host: Host) -> None:
    """S62."""
    ask(host, sources={"deny": [f"{CLIENT}/32"]})
    before = dropped(host, "DROP_SOURCE_DENIED")
    assert not connects(host, timeout_s=1.2)
    assert dropped(host, "DROP_SOURCE_DENIED") > before
    ask(host, sources={"allow": ["10.9.0.0/24"], "deny": ["10.9.0.128/25"]})
    assert connects(host)
    ask(host, sources={"allow": ["198.51.100.0/24"]})
    assert not connects(host, timeout_s=1.2)
    ask(host)
    assert connects(host)


def test_new_connections_are_limited(host: Host) -> None:
    ask(host, rate={"connections": 0.01, "burst": 3})
    assert [connects(host) for _ in range(3)] == [True] * 3
    before = dropped(host, "DROP_RATE_LIMITED")
    assert not connects(host, timeout_s=1.2)
    assert dropped(host, "DROP_RATE_LIMITED") > before
    ask(host)
    assert connects(host)


def test_every_port_of_a_vip(host: Host) -> None:
    ask(host, ports=["any"])
    assert [connects(host, port) for port in (1, 80, 65000)] == [True] * 3
    shown = host.json("service", "show", "asked")
    assert "any" in str(shown)


def test_a_hash_in_force_stays(host: Host) -> None:
    ask(host)
    host.write("asked", SERVICE | {"hash": "client"})
    done = host.shunt("config", "reload")
    assert done.code == 1
    assert "can't change while the service is in force" in done.err
    assert connects(host)
    ask(host)
