# SPDX-License-Identifier: Apache-2.0
"""TC programs attached, swapped and taken away, beside somebody else's.

```
    here: eth0 10.9.0.1 ------ 10.9.0.2 eth0 :there
```
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shunt.kern import features, tc
from shunt.kern.bpffs import ensure_bpffs
from shunt.kern.objects import Object, pin
from shunt.kern.tc import Direction
from shunt.lab.netns import Namespace, veth
from shunt.lab.topology import remove_tree
from shunt.lb.errors import ShuntError
from shunt.tc.attach import attach, attached, cleanup
from tests.netns import iproute

OBJECT = Path(__file__).with_name("beside.bpf.o")
INGRESS, EGRESS, BEFORE, AFTER, NEXT = range(5)


@dataclass
class Scene:
    here: Namespace
    there: Namespace
    obj: Object
    bpffs: Path
    use_tcx: bool
    ifindex: int
    held: list[int]

    def attach(self, *interfaces: str, ingress: str = "shunt_ingress") -> None:
        fds = {
            Direction.INGRESS: self.obj.programs[ingress].fd,
            Direction.EGRESS: self.obj.programs["shunt_egress"].fd,
        }
        attach(self.bpffs, interfaces or ("eth0",), fds, use_tcx=self.use_tcx)

    def foreign(self, name: str) -> None:
        """Somebody else's program at ingress."""
        if self.use_tcx:
            fd = self.obj.programs[name].fd
            self.held.append(tc.attach_link(fd, self.ifindex, Direction.INGRESS))
            return
        if "clsact" not in tc.qdiscs(self.ifindex):
            self.here.run("tc", "qdisc", "add", "dev", "eth0", "clsact")
        priority = "10" if name == "foreign_before" else "60000"
        iproute.run(
            self.here,
            *("tc", "filter", "add", "dev", "eth0", "ingress", "prio", priority, "protocol", "all"),
            *("bpf", "da", "object-pinned", str(self.bpffs / name)),
        )

    def counted(self) -> dict[int, bool]:
        """Who has seen a datagram that came in, and the answer that went out."""
        view = self.obj.maps["seen"]

        def all_seen() -> list[int]:
            return [int(view.lookup(i)) for i in range(5)]  # type: ignore[arg-type]

        before = all_seen()
        self.there.run("ping", "-c1", "-W2", "10.9.0.1")
        return {i: n > before[i] for i, n in enumerate(all_seen())}


@pytest.fixture(params=["tcx", "clsact"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    if request.param == "tcx" and not (found := features.tcx()).present:
        pytest.skip(f"needs tcx: {found.why}")
    made: list[Namespace] = []
    bpffs = Path(f"/sys/fs/bpf/shunt-tca-{os.getpid()}")
    ensure_bpffs(bpffs)
    held: list[int] = []
    try:
        for end in ("here", "there"):
            made.append(Namespace.create(f"shunt-tca-{os.getpid()}-{end}"))
        here, there = made
        veth(here, "eth0", there, "eth0", 1500)
        here.ip("addr add 10.9.0.1/24 dev eth0")
        there.ip("addr add 10.9.0.2/24 dev eth0")
        with Object(OBJECT) as obj, here.inside():
            obj.load()
            for name in ("foreign_before", "foreign_after"):
                pin(obj.programs[name].fd, bpffs / name)
            yield Scene(
                here, there, obj, bpffs, request.param == "tcx", socket.if_nametoindex("eth0"), held
            )
    finally:
        for fd in held:
            os.close(fd)
        for namespace in made:
            namespace.delete()
        remove_tree(bpffs)


def test_between_programs_of_others(scene: Scene) -> None:
    scene.foreign("foreign_before")
    scene.attach()
    scene.foreign("foreign_after")
    assert scene.counted() == {INGRESS: True, EGRESS: True, BEFORE: True, AFTER: True, NEXT: False}
    assert attached(scene.bpffs) == {"eth0": "tcx" if scene.use_tcx else "clsact"}
    assert cleanup(scene.bpffs)
    assert scene.counted() == {
        **dict.fromkeys((INGRESS, EGRESS, NEXT), False),
        **dict.fromkeys((BEFORE, AFTER), True),
    }
    assert not (scene.bpffs / "tc").exists()


def test_a_swap_keeps_place_and_number(scene: Scene) -> None:
    scene.attach()
    scene.foreign("foreign_after")
    scene.attach()  # the same again
    if scene.use_tcx:  # a filter is known by its program's name, and a version keeps that
        scene.attach(ingress="shunt_next")
        assert scene.counted()[NEXT]
    else:
        assert len(tc.our_filters(scene.ifindex, Direction.INGRESS, "shunt_ingress")) == 1
        assert len(tc.our_filters(scene.ifindex, Direction.EGRESS, "shunt_egress")) == 1
    assert scene.counted()[AFTER]


def test_it_leaves_the_interface_as_it_was_found(scene: Scene) -> None:
    found = tc.qdiscs(scene.ifindex)
    scene.attach()
    assert ("clsact" in tc.qdiscs(scene.ifindex)) is not scene.use_tcx
    cleanup(scene.bpffs)
    assert tc.qdiscs(scene.ifindex) == found


def test_a_qdisc_of_others_stays(scene: Scene) -> None:
    scene.here.run("tc", "qdisc", "add", "dev", "eth0", "clsact")
    scene.attach()
    cleanup(scene.bpffs)
    assert "clsact" in tc.qdiscs(scene.ifindex)


def test_our_qdisc_stays_for_others_filters(scene: Scene) -> None:
    scene.attach()
    scene.foreign("foreign_after")
    cleanup(scene.bpffs)
    assert scene.counted()[AFTER]


def test_an_interface_that_is_no_longer_wanted(scene: Scene) -> None:
    scene.attach()
    attach(scene.bpffs, (), {}, use_tcx=scene.use_tcx)
    assert attached(scene.bpffs) == {}
    assert not scene.counted()[INGRESS]


def test_an_interface_that_went_and_came_again(scene: Scene) -> None:
    scene.attach()
    scene.here.ip("link del eth0")
    veth(scene.here, "eth0", scene.there, "eth0", 1500)
    scene.here.ip("addr add 10.9.0.1/24 dev eth0")
    scene.there.ip("addr add 10.9.0.2/24 dev eth0")
    scene.attach()
    assert scene.counted()[INGRESS]


def test_an_ingress_qdisc_in_the_way(scene: Scene) -> None:
    scene.here.run("tc", "qdisc", "add", "dev", "eth0", "ingress")
    if scene.use_tcx:
        scene.attach()
        assert scene.counted()[INGRESS]
        return
    with pytest.raises(ShuntError, match="leaves no room for a clsact") as refused:
        scene.attach()
    assert "tc qdisc del dev eth0 ingress" in refused.value.fix
    assert tc.qdiscs(scene.ifindex) >= {"ingress"}
