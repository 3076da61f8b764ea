# SPDX-License-Identifier: Apache-2.0
"""The agent's part of what services ask for beyond balancing, on real maps."""

from __future__ import annotations

from ipaddress import ip_network

import numpy as np
import pytest

from shunt.agent.options import DropSources, PutSources
from shunt.agent.quic import PutServerId, ServerIds
from shunt.agent.writes import PutService
from shunt.lb.errors import ShuntError
from shunt.lb.model import Mode, Protocol, Quic
from shunt.policy.sources import compile_rules
from tests.packets.histories import ACK, SYN, Lab
from tests.packets.test_scan import A, B, lab, states

DENIED = compile_rules([], [ip_network("192.0.2.0/25")])
ALLOWED = compile_rules([ip_network("192.0.2.0/24")], [])


def sets(lb: Lab) -> dict[int, int]:
    """Rules in map sources, by set."""
    keys, _ = lb.obj.maps["sources"].items()
    ids, counts = np.unique(keys["set"], return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


def served(lb: Lab) -> bool:
    return lb.send(1, ACK, 1) is not None


@pytest.mark.parametrize("mode", [Mode.DSR_IPIP, Mode.NAT])
def test_source_ranges_come_change_and_go(mode: Mode) -> None:
    with lab(mode=mode) as lb:
        assert sets(lb) == {}
        for rules, ok in ((ALLOWED, True), (DENIED, False), ((), True), (DENIED, False)):
            lb.sources = rules
            assert lb.reconcile() > 0
            assert list(sets(lb).values()) == [len(rules)] * bool(rules)
            if mode is not Mode.NAT:
                assert served(lb) is ok
            assert lb.reconcile() == 0
        lb.restart()
        assert lb.reconcile() == 0, "a restart finds them"
        assert lb.planner.plan({}, lb.now_ns, lb.condition)[-1] == DropSources(3)


def test_at_no_moment_do_other_rules_hold() -> None:
    """The new set is whole before the service is pointed at it, and the old one goes after."""
    with lab() as lb:
        lb.sources = ALLOWED
        lb.reconcile()
        lb.sources = DENIED
        writes = lb.planner.plan(lb.targets(), lb.now_ns, lb.condition)
        kinds = [type(w) for w in writes]
        assert kinds.index(PutSources) < kinds.index(PutService) < kinds.index(DropSources)
        for stop in range(len(writes) + 1):
            lb.applier.apply(writes[stop - 1 : stop])
            pointed = PutService in kinds[:stop]
            assert served(lb) is not pointed


def test_a_set_that_a_killed_agent_left_is_removed() -> None:
    with lab() as lb:
        lb.sources = DENIED
        writes = lb.planner.plan(lb.targets(), lb.now_ns, lb.condition)
        lb.applier.apply(w for w in writes if isinstance(w, PutSources))
        assert len(sets(lb)) == 1
        lb.restart()
        lb.sources = ()
        lb.reconcile()
        assert sets(lb) == {}


def test_more_rules_than_fit_are_refused_and_nothing_changes() -> None:
    with lab(sizes={"sources": 4}) as lb:
        lb.sources = DENIED
        lb.reconcile()
        before = sets(lb)
        lb.sources = compile_rules([], [ip_network(f"192.0.2.{n}") for n in range(0, 20, 2)])
        with pytest.raises(ShuntError) as caught:
            lb.reconcile()
        assert caught.value.what == "table sources is full"
        assert sets(lb) == before
        assert not served(lb)


def test_the_hash_stays_while_the_service_is_in_force() -> None:
    with lab() as lb:
        lb.hash_by = "client"
        with pytest.raises(ShuntError) as caught:
            lb.reconcile()
        assert caught.value.what == "hash of web/tcp can't change while the service is in force"
        lb.hash_by = "tuple"
        assert lb.reconcile() == 0


def test_affinity_switched_off_is_looked_up_until_its_flows_have_ended() -> None:
    """S53."""
    with lab(affinity_s=1000) as lb:
        flows = {flow: lb.send(flow, SYN, 1) for flow in range(0, 3200, 32)}  # of one client
        (backend,) = set(flows.values())
        (other,) = {A, B} - {backend}
        lb.affinity_s = 0
        assert lb.reconcile() > 0
        assert {flow: lb.send(flow, ACK, 2) for flow in flows} == flows
        lb.now_s += 1
        lb.scan()
        assert states(lb) == {0, 2}, "slots with exceptions linger, others have settled"
        assert {flow: lb.send(flow, ACK, 3) for flow in flows} == flows
        assert other in {lb.send(flow, SYN, 1) for flow in range(6400, 9600, 32)}
        assert lb.scanner.last is not None
        assert lb.scanner.last.clients == 0
        lb.now_s += 70
        lb.scan()
        lb.now_s += 1
        lb.scan()
        assert states(lb) == {0}


def test_clients_are_forgotten_after_their_time() -> None:
    with lab(affinity_s=30) as lb:
        for flow in range(32):
            lb.send(flow, SYN, 1)
        lb.scan()
        assert lb.scanner.last is not None
        assert lb.scanner.last.clients == 32
        lb.now_s += 20
        for flow in range(16):
            lb.send(flow + 3200, SYN, 1)
        lb.now_s += 20
        lb.scan()
        assert lb.scanner.last.clients == 16
        lb.now_s += 40
        lb.scan()
        assert lb.scanner.last.clients == 0
        assert not len(lb.tables.flows.flows())


def test_clients_of_a_backend_that_is_gone_are_forgotten_at_once() -> None:
    with lab(affinity_s=1000) as lb:
        first = {flow: lb.send(flow, SYN, 1) for flow in range(32)}
        assert set(first.values()) == {A, B}
        lb.configured.discard(B)
        lb.gone.add(B)
        lb.reconcile()
        lb.scan()
        assert lb.scanner.last is not None
        assert lb.scanner.last.clients == list(first.values()).count(A)
        assert {lb.send(flow + 3200, SYN, 1) for flow in range(32)} == {A}


# QUIC by connection id --------------------------------------------------------------------------


def server_ids(lb: Lab) -> dict[bytes, int]:
    """What map server_ids has, as another agent reads it: backends by server id."""
    found = ServerIds(lb.obj.maps["server_ids"]).there
    assert len(found) <= 1
    return next(iter(found.values()), {})


def wanted(lb: Lab) -> dict[bytes, int]:
    (place,) = lb.tables.placed.values()
    return {e.address.packed: i for e, i in place.backends.items() if e.address in lb.configured}


def test_server_ids_come_change_and_go() -> None:
    with lab(protocol=Protocol.UDP) as lb:
        assert server_ids(lb) == {}
        lb.quic = Quic(4)
        assert lb.reconcile() > 0
        assert server_ids(lb) == wanted(lb)
        assert len(wanted(lb)) == 2
        assert lb.reconcile() == 0
        lb.restart()
        assert lb.reconcile() == 0, "a restart finds them"
        lb.configured.add(A + 9)
        lb.configured.discard(B)
        lb.reconcile()
        assert server_ids(lb) == wanted(lb)
        lb.quic = None
        lb.reconcile()
        assert server_ids(lb) == {}
        lb.quic = Quic(4)
        lb.reconcile()
        lb.applier.apply(lb.planner.plan({}, lb.now_ns, lb.condition))
        assert server_ids(lb) == {}, "nor does a service leave any"


def test_at_every_moment_a_server_id_leads_to_a_backend_that_is_there() -> None:
    with lab(protocol=Protocol.UDP) as lb:
        for quic, backends in ((Quic(4), {A, B}), (Quic(4), {A, A + 7}), (None, {A}), (None, {B})):
            lb.quic, lb.configured = quic, set(backends)
            writes = lb.planner.plan(lb.targets(), lb.now_ns, lb.condition)
            for stop in range(len(writes) + 1):
                lb.applier.apply(writes[stop - 1 : stop] if stop else [])
                assert all(lb.tables.known()[i] for i in server_ids(lb).values())
            assert server_ids(lb) == (wanted(lb) if quic else {})


def test_server_ids_that_a_killed_agent_left_are_removed() -> None:
    with lab(protocol=Protocol.UDP) as lb:
        lb.quic = Quic(4)
        writes = lb.planner.plan(lb.targets(), lb.now_ns, lb.condition)
        lb.applier.apply(w for w in writes if isinstance(w, PutServerId))
        assert len(server_ids(lb)) == 2
        lb.restart()
        lb.quic = None
        lb.reconcile()
        assert server_ids(lb) == {}


def test_more_server_ids_than_fit_are_refused_and_nothing_changes() -> None:
    with lab(sizes={"server_ids": 4}, protocol=Protocol.UDP) as lb:
        lb.quic = Quic(4)
        lb.reconcile()
        before = server_ids(lb)
        lb.configured |= {A + n for n in range(10, 13)}
        with pytest.raises(ShuntError) as caught:
            lb.reconcile()
        assert caught.value.what == "table server_ids is full"
        assert server_ids(lb) == before
