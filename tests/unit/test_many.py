# SPDX-License-Identifier: Apache-2.0
"""What keeps the cost of a change from growing with the number of services."""

import asyncio
import re
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import numpy as np
import pytest

from shunt.agent.checks import Checks
from shunt.agent.probes.schedule import no_way
from shunt.kern.memory import sparse
from shunt.lb.compile import Endpoint, differing
from shunt.lb.errors import ShuntError
from shunt.lb.frontends import FrontendTable
from shunt.lb.lookup import SHOWN, find_service
from shunt.lb.model import (
    Backend,
    Configuration,
    Frontend,
    HealthCheck,
    Port,
    Protocol,
    Service,
    Settings,
)

VIP, ADDRESS = IPv4Address("203.0.113.1"), IPv4Address("10.0.0.1")


def service(n: int) -> Service:
    backends = (Backend(ADDRESS + n),)
    return Service(f"s{n:04}", (VIP + n,), (Port(80, Protocol.TCP),), backends=backends)


def test_services_that_came_went_or_changed_differ() -> None:
    before = [service(n) for n in range(5)]
    after = [service(n) for n in range(1, 6)]  # equal ones, made anew
    after[2] = replace(after[2], slots_per_backend=7)
    assert differing(before, after) == {"s0000", "s0003", "s0005"}
    assert differing(before, [service(n) for n in range(5)]) == set()
    assert differing([], before) == {s.name for s in before}


def test_a_service_is_found_by_its_name_and_a_wrong_name_shows_some() -> None:
    services = tuple(service(n) for n in range(SHOWN + 7))
    configuration = Configuration(Settings(("eth0",)), services)
    assert all(find_service(configuration, s.name) is s for s in services)
    for name in ("", "s", "s0000.5", "zzz"):
        with pytest.raises(ShuntError, match=f"no service {name}") as refused:
            find_service(configuration, name)
        assert refused.value.why.endswith("s0099 and 7 more")
    with pytest.raises(ShuntError, match="there are: none"):
        find_service(replace(configuration, services=()), "web")


def test_equal_endpoints_have_equal_hashes() -> None:
    some = {Endpoint(ADDRESS + n, port) for n in range(50) for port in (0, 80)}
    assert len(some) == 100
    assert Endpoint(IPv4Address("10.0.0.3"), 80) in some
    assert Endpoint(IPv4Address("10.0.0.3"), 81) not in some


def test_a_frontend_says_where_it_leads() -> None:
    table = FrontendTable(np.zeros((16, 2, 4), np.uint64))
    frontend = Frontend(VIP, 80, Protocol.TCP)
    assert table.get(frontend) == 0
    table.put(frontend, 0xFFFFFF)
    assert table.get(frontend) == 0xFFFFFF
    assert table.get(Frontend(VIP, 80, Protocol.UDP)) == 0
    table.drop(frontend)
    assert table.get(frontend) == 0


def rss_anon_kb() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def test_a_sparse_table_takes_memory_where_it_was_written() -> None:
    table = sparse(32 << 20, np.uint64)
    before = rss_anon_kb()
    assert not table[:: 1 << 18].any()
    table[:: 1 << 18] = 7  # every 2 MB of 256
    assert rss_anon_kb() - before < 16 << 10
    assert int(table.sum(dtype=np.uint64)) == 7 * 128


def test_services_that_come_in_portions_do_not_start_slowly(tmp_path: Path) -> None:
    """Only a backend that joins others does, in whatever portion its service came."""
    check = HealthCheck(slow_start_s=60.0)
    services = {f"s{n:04}": replace(service(n), health=check) for n in range(2)}

    async def watch() -> None:
        checks = Checks(lambda _service, _gone: None, tmp_path)
        checks.start(lambda _key: "", no_way)
        for name in services:
            checks.watch(services, [name], [])
        assert not any((s.name, Endpoint(s.backends[0].address, 0)) in checks.slow
                       for s in services.values())  # fmt: skip
        more = (*services["s0001"].backends, Backend(ADDRESS + 7))
        checks.watch(services | {"s0001": replace(services["s0001"], backends=more)}, ["s0001"], [])
        assert ("s0001", Endpoint(ADDRESS + 7, 0)) in checks.slow
        assert ("s0001", Endpoint(ADDRESS + 1, 0)) not in checks.slow
        checks.close()

    asyncio.run(watch())
