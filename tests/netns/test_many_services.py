# SPDX-License-Identifier: Apache-2.0
"""More services than are changed at once: what is in force after a reload is what the files say."""

from __future__ import annotations

import contextlib

import yaml

from shunt.agent.batches import BATCH
from shunt.agent.tables import Tables
from shunt.kern.maps import Map
from shunt.kern.objects import Object
from shunt.lb import slots as slot
from shunt.xdp.attach import OBJECT
from tests.netns.shunt_host import Host

SERVICES = 3 * BATCH + 10


def write(host: Host, turn: int, weight: int, services: int = SERVICES) -> None:
    """Each service has two backends; the first `services` / 2 VIPs move on by `turn` services."""
    half = services // 2
    documents = [
        {
            "name": f"s{n}",
            "vip": f"198.19.1.{(n + turn) % half if n < half else n}",
            "ports": [80, "53/udp"],
            "backends": [f"10.9.1.{n}", {"address": f"10.9.2.{n}", "weight": weight}],
            "slots_per_backend": 8,
            "health": "none",
        }
        for n in range(services)
    ]
    draft = host.services / ".many"
    draft.write_text(yaml.safe_dump(documents))
    draft.replace(host.services / "many.yaml")


def in_force(host: Host, turn: int, weight: int, services: int = SERVICES) -> None:
    """The maps, as another agent would read them, hold what was written."""
    with contextlib.ExitStack() as stack:
        obj = stack.enter_context(Object(OBJECT))
        maps = {path.name: Map.pinned(path) for path in (host.bpffs / "maps").iterdir()}
        for each in maps.values():
            stack.callback(each.close)
        tables = Tables(maps, obj.btf, 0)
        half = services // 2
        assert not tables.stale_frontends
        for n in range(services):
            for target, port in ((f"s{n}/tcp", 80), (f"s{n}/udp", 53)):
                place = tables.placed[target]
                vip = f"198.19.1.{(n + turn) % half if n < half else n}"
                assert [(str(f.vip), f.port) for f in place.frontends] == [(vip, port)]
                owners = slot.cur(tables.words[place.slots()]).tolist()
                shares = {str(e.address): owners.count(i) for e, i in place.backends.items()}
                heavy = 16 * weight // (weight + 1)
                assert shares == {f"10.9.1.{n}": 16 - heavy, f"10.9.2.{n}": heavy}
        names = {f"s{n}/{p}" for n in range(services) for p in ("tcp", "udp")}
        assert {name for name in tables.placed if name.startswith("s")} == names


def begin(host: Host) -> None:
    for path in host.services.iterdir():
        path.unlink()
    host.here.ip("route add 10.9.0.0/16 via 10.9.0.2")
    write(host, turn=0, weight=1)
    host.start()


def reload(host: Host) -> None:
    done = host.shunt("config", "reload")
    assert done.code == 0, done.err


def test_all_services_change_and_frontends_move_between_them(own: Host) -> None:
    begin(own)
    in_force(own, turn=0, weight=1)
    # All but one batch at a time; then with half of the VIPs moving, which is one batch.
    for turn, weight in ((0, 3), (1, 1), (7, 3)):
        write(own, turn, weight)
        reload(own)
        in_force(own, turn, weight)
    # Fewer services, and so other VIPs for those that stay.
    write(own, turn=0, weight=1, services=BATCH)
    reload(own)
    in_force(own, turn=0, weight=1, services=BATCH)


def test_a_restart_after_changes_finds_nothing_left_to_write(own: Host) -> None:
    begin(own)
    for turn, weight in ((3, 3), (3, 1)):
        write(own, turn, weight)
        reload(own)
    assert own.process is not None
    own.process.stop()
    own.start()
    assert own.json("status")["apply"]["writes"] == 0
