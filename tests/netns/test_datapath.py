# SPDX-License-Identifier: Apache-2.0
"""Loading, pinning, attaching, swapping and resizing, on a real interface.

```
    here: eth0 ------ eth0 :there
```
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shunt.kern import links
from shunt.kern.bpffs import ensure_bpffs
from shunt.kern.flows import FlowTable, State, pack
from shunt.kern.maps import Map
from shunt.kern.netlink import Netlink
from shunt.lab.netns import Namespace, veth
from shunt.lb.errors import ShuntError
from shunt.lb.model import Limits, Settings
from shunt.xdp.attach import Datapath, cleanup
from tests.netns import iproute

SMALL = Limits(
    frontends=256, services=64, slots=4096, backends=256, nexthops=64, flows=1024, nat=1024
)
SETTINGS = Settings(interfaces=("eth0",), limits=SMALL)


@pytest.fixture
def here() -> Iterator[Namespace]:
    name = f"shunt-dp-{os.getpid()}"
    made = []
    try:
        for end in ("here", "there"):
            made.append(Namespace.create(f"{name}-{end}"))
        veth(made[0], "eth0", made[1], "eth0", 1500)
        with made[0].inside():
            yield made[0]
    finally:
        for namespace in made:
            namespace.delete()


@pytest.fixture
def bpffs(here: Namespace) -> Iterator[Path]:
    path = Path(f"/sys/fs/bpf/shunt-dp-{os.getpid()}")
    ensure_bpffs(path)
    try:
        yield path
    finally:
        cleanup(path)
        shutil.rmtree(path, ignore_errors=True)


def loaded(bpffs: Path, settings: Settings = SETTINGS) -> Datapath:
    datapath = Datapath(bpffs)
    datapath.load(settings)
    return datapath


def program_of(interface: str) -> links.Attached:
    with Netlink() as netlink:
        return links.query(netlink.link(interface).ifindex)


def test_what_is_pinned_goes_on_without_an_agent(bpffs: Path) -> None:
    datapath = loaded(bpffs)
    datapath.attach(["eth0"], "auto")
    assert datapath.modes == {"eth0": "native"}
    before = program_of("eth0")
    datapath.close()
    assert (before.prog_name, program_of("eth0")) == ("shunt_lb", before)


def test_a_restart_swaps_the_program_and_keeps_the_maps(bpffs: Path) -> None:
    first = loaded(bpffs)
    first.attach(["eth0"], "auto")
    first.maps["slots"].mapped()["word"][7] = 42
    before = program_of("eth0")
    first.close()
    second = loaded(bpffs)
    second.attach(["eth0"], "auto")
    assert program_of("eth0").prog_id not in (0, before.prog_id)
    assert second.maps["slots"].mapped()["word"][7] == 42
    second.close()


def test_generic_mode_where_asked_for(bpffs: Path) -> None:
    datapath = loaded(bpffs)
    datapath.attach(["eth0"], "generic")
    assert datapath.modes == {"eth0": "generic"}
    assert program_of("eth0").mode == "generic"
    datapath.close()


def test_cleanup_leaves_the_host_as_it_was(bpffs: Path) -> None:
    datapath = loaded(bpffs)
    datapath.attach(["eth0"], "auto")
    datapath.close()
    removed = cleanup(bpffs)
    assert str(bpffs / "links" / "eth0") in removed
    assert program_of("eth0").prog_id == 0
    assert not bpffs.exists()
    assert cleanup(bpffs) == []


def test_an_interface_that_is_taken_names_the_holder(bpffs: Path, here: Namespace) -> None:
    other = Path(__file__).resolve().parents[2] / "tests" / "packets" / "headroom.bpf.o"
    iproute.run(here, "ip", "link", "set", "dev", "eth0", "xdp", "obj", str(other), "sec", "xdp")
    holder = program_of("eth0")
    datapath = loaded(bpffs)
    with pytest.raises(ShuntError) as caught:
        datapath.attach(["eth0"], "auto")
    assert f"eth0 already has XDP program {holder.prog_name!r}" in caught.value.what
    assert "detach" in caught.value.fix
    assert program_of("eth0") == holder
    datapath.close()


def test_an_absent_interface(bpffs: Path) -> None:
    datapath = loaded(bpffs)
    datapath.attach(["eth0"], "auto")
    with pytest.raises(ShuntError, match="eth7") as caught:
        datapath.attach(["eth0", "eth7"], "auto")
    assert caught.value.fix
    assert program_of("eth0").prog_id  # the other is as it was
    datapath.close()


def test_an_interface_that_is_down(bpffs: Path, here: Namespace) -> None:
    here.ip("link set eth0 down")
    datapath = loaded(bpffs)
    with pytest.raises(ShuntError, match="eth0 is down") as caught:
        datapath.attach(["eth0"], "auto")
    assert "ip link set" in caught.value.fix
    datapath.close()


def test_jumbo_frames_fall_back_or_are_refused_with_the_limit(bpffs: Path, here: Namespace) -> None:
    here.ip("link add eth1 mtu 9000 type veth peer name peer1 mtu 9000")
    here.ip("link set eth1 up", "link set peer1 up")
    datapath = loaded(bpffs)
    with pytest.raises(ShuntError) as caught:
        datapath.attach(["eth1"], "native")
    assert "eth1 in mode native with an MTU of 9000" in caught.value.what
    assert f"{links.ONE_BUFFER_MTU} bytes" in caught.value.why
    datapath.attach(["eth1"], "auto")
    assert datapath.modes == {"eth1": "generic"}
    datapath.attach([], "auto")
    # The limit is true: doing as the error says helps, and one byte more does not.
    for mtu, helps in ((links.ONE_BUFFER_MTU + 1, False), (links.ONE_BUFFER_MTU, True)):
        here.ip(f"link set eth1 mtu {mtu}", f"link set peer1 mtu {mtu}")
        if helps:
            datapath.attach(["eth1"], "native")
        else:
            with pytest.raises(ShuntError):
                datapath.attach(["eth1"], "native")
    datapath.close()


def test_an_interface_that_came_again_is_attached_again(bpffs: Path, here: Namespace) -> None:
    datapath = loaded(bpffs)
    datapath.attach(["eth0"], "auto")
    here.ip("link del eth0", "link add eth0 type veth peer name peer0", "link set eth0 up")
    here.ip("link set peer0 up")
    datapath.attach(["eth0"], "auto")
    assert program_of("eth0").prog_name == "shunt_lb"
    datapath.close()


def test_an_interface_no_longer_configured_is_let_go(bpffs: Path, here: Namespace) -> None:
    here.ip("link add eth1 type veth peer name peer1", "link set eth1 up", "link set peer1 up")
    datapath = loaded(bpffs)
    datapath.attach(["eth0", "eth1"], "auto")
    datapath.attach(["eth1"], "auto")
    assert program_of("eth0").prog_id == 0
    assert program_of("eth1").prog_id
    datapath.close()


def flows_of(m: Map, ports: range) -> None:
    flows = np.zeros(len(ports), m.spec.value)
    flows["key"]["sport"], flows["key"]["proto"], flows["hash"] = ports, 6, ports
    flows["word"] = pack(1, State.CONFIRMED, 1)
    FlowTable(m.mapped()).insert(flows)


def test_maps_grow_and_nothing_in_them_is_lost(bpffs: Path) -> None:
    first = loaded(bpffs)
    first.attach(["eth0"], "auto")
    first.maps["slots"].mapped()["word"][4095] = 9
    flows_of(first.maps["flows"], range(1, 900))
    grown = replace(SETTINGS, limits=replace(SMALL, slots=8192, flows=4096))
    second = loaded(bpffs, grown)
    # Remembered by the program that is still attached, after the copy was taken.
    flows_of(first.maps["flows"], range(900, 950))
    second.attach(["eth0"], "auto")
    first.close()
    second.close()
    flows, slots = Map.pinned(bpffs / "maps" / "flows"), Map.pinned(bpffs / "maps" / "slots")
    assert (flows.spec.entries, slots.spec.entries) == (8192, 8192)
    assert sorted(FlowTable(flows.mapped()).flows()["key"]["sport"].tolist()) == list(range(1, 950))
    assert slots.mapped()["word"][4095] == 9
    assert not (bpffs / "maps-new").exists()
    third = loaded(bpffs, grown)  # and is found again
    assert third.maps["slots"].mapped()["word"][4095] == 9
    third.close()


def test_a_map_does_not_shrink_below_what_is_in_it(bpffs: Path) -> None:
    first = loaded(bpffs)
    first.attach(["eth0"], "auto")
    first.maps["slots"].mapped()["word"][3000] = 9
    before = program_of("eth0")
    with pytest.raises(ShuntError) as caught:
        loaded(bpffs, replace(SETTINGS, limits=replace(SMALL, slots=2048)))
    assert caught.value.what == "map slots can't shrink to 2048 elements"
    assert "limits" in caught.value.fix
    assert program_of("eth0") == before
    first.close()
    second = loaded(bpffs)
    assert second.maps["slots"].mapped()["word"][3000] == 9
    second.close()


def test_pins_of_another_version(bpffs: Path) -> None:
    first = loaded(bpffs)
    first.attach(["eth0"], "auto")
    first.maps["meta"].mapped()["abi"] = 77
    before = program_of("eth0")
    first.close()
    with pytest.raises(ShuntError) as caught:
        loaded(bpffs)
    assert "are of version 77" in caught.value.what
    assert "shunt cleanup" in caught.value.fix
    assert (before.prog_name, program_of("eth0")) == ("shunt_lb", before)


def test_pins_of_another_layout_list_each_difference(bpffs: Path) -> None:
    loaded(bpffs).close()
    (bpffs / "maps" / "svc").unlink()
    (bpffs / "maps" / "backends").rename(bpffs / "maps" / "svc")
    with pytest.raises(ShuntError) as caught:
        loaded(bpffs)
    assert "is not the one this version uses" in caught.value.what
    assert "field region: absent there" in caught.value.why
    assert "field addr: absent here" in caught.value.why


def test_another_hash_seed_is_refused(bpffs: Path) -> None:
    loaded(bpffs).close()
    with pytest.raises(ShuntError, match="hash_seed is 5, and was 0") as caught:
        loaded(bpffs, replace(SETTINGS, hash_seed=5))
    assert "connection" in caught.value.why


def test_without_privileges(tmp_path: Path) -> None:
    """The error of somebody who is not root, from the real kernel."""
    script = (
        "from pathlib import Path\n"
        "from shunt.kern.features import check_host\n"
        "from shunt.lb.errors import ShuntError\n"
        "try:\n    check_host()\n"
        "except ShuntError as e:\n    print(e)\n"
    )
    build = Path(__file__).resolve().parents[2] / "build"
    # Anybody else may not even be able to enter the checkout.
    owner = build.parent.stat().st_uid
    done = subprocess.run(
        ["setpriv", f"--reuid={owner}", "--clear-groups", "--bounding-set=-all",
         str(build / "venv" / "bin" / "python"), "-c", script],
        env={"PYTHONPATH": str(build / "py"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "why:" in done.stdout, done
    assert "root" in done.stdout
