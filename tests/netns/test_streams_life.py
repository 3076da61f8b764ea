# SPDX-License-Identifier: Apache-2.0
"""Redirected streams while the daemon and the services change. stream_forms.py draws the node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shunt.kern import cgroup, links
from shunt.kern.objects import Object, open_pin, pin
from shunt.sockops.streams import BUDGET_MESSAGES, OBJECT
from tests.netns import stream_forms
from tests.netns.stream_forms import Guarded, fill, guarded, pair, read_all, rounds, ways


@pytest.fixture(scope="module")
def ours() -> Iterator[Guarded]:
    with guarded("streams-life") as form:
        yield form


def redirects(form: Guarded) -> bool:
    found: bool = form.status()["sockets"]["streams"]["attached"]
    return found


@pytest.fixture
def anew(ours: Guarded) -> Iterator[Guarded]:
    """With services and a daemon that the test may change; then as it was."""
    node = ours.node
    usual = node.config.read_text()
    yield ours
    for service, document in stream_forms.SERVICES.items():
        node.write(service, {"name": service, **document})
    node.config.write_text(usual)
    if node.process is None or not node.process.running:
        node.start()
    node.until(lambda: redirects(ours), "redirects again")


def switch(form: Guarded, to: str, *services: str) -> None:
    """Redirect services or do not, and wait until that is in force."""
    node = form.node
    before = form.status()["generation"]
    for service in services:
        node.write(service, {"name": service, **stream_forms.SERVICES[service], "redirect": to})
    last = to == "off" and len(services) == 2
    node.until(
        lambda: form.status()["generation"] > before and redirects(form) is not last,
        "in force",
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["restart", "kill -9"])
def test_the_daemon_goes_and_comes_again(anew: Guarded, number: int) -> None:
    node = anew.node
    with pair(anew) as kept, pair(anew) as (sender, reader):
        rounds(*kept)
        sender.sendall(b"unread ")
        before = anew.events()
        assert node.process is not None
        node.process.popen.send_signal(number)
        node.process.popen.wait()
        rounds(*kept)
        with pair(anew) as meanwhile:
            rounds(*meanwhile)
            node.start()
            assert anew.events()["REDIRECTED"] - before["REDIRECTED"] == 80
            rounds(*kept)
            rounds(*meanwhile)
        with pair(anew) as after:
            rounds(*after)
        assert anew.events()["REDIRECTED"] - before["REDIRECTED"] == 200
        sender.sendall(b"and more")
        assert read_all(reader, 15) == b"unread and more"
    assert node.json("status")["sockets"]["streams"]["attached"]


def test_a_service_that_is_not_redirected_any_more(anew: Guarded) -> None:
    with pair(anew) as (client, server), anew.counted() as events:
        rounds(client, server)
        client.sendall(b"unread ")
        switch(anew, "off", "redirected")
        assert ways(anew, client, server) == [("tcp", "TO_TCP_OPTED_OUT")] * 2
        client.sendall(b"and more")
        assert read_all(server, 15) == b"unread and more"
        rounds(client, server)
        with pair(anew) as new:
            rounds(*new)
    assert (events["REDIRECTED"], events["TO_TCP_OPTED_OUT"]) == (41, 1)
    assert events["GONE"] == 2


def attached_programs() -> set[str]:
    shown = subprocess.run(
        ["bpftool", "-j", "cgroup", "show", str(cgroup.root())], capture_output=True, check=True
    )
    return {f"{each['id']}" for each in json.loads(shown.stdout.strip() or "[]")}


def pinned_programs(form: Guarded) -> set[str]:
    found = set()
    for path in (form.node.bpffs / "streams/links").iterdir():
        fd = open_pin(path)
        found.add(f"{links.cgroup_info(fd)[1]}")
        os.close(fd)
    return found


def test_the_last_service_that_is_redirected_takes_the_programs_away(anew: Guarded) -> None:
    ours = pinned_programs(anew)
    assert len(ours) == 2
    assert ours <= attached_programs()
    with pair(anew) as (client, server):
        rounds(client, server)
        client.sendall(b"unread ")
        switch(anew, "off", "redirected", "redirected-six")
        assert ways(anew, client) == [("off", "")]
        assert not (anew.node.bpffs / "streams").exists()
        assert not ours & attached_programs()
        client.sendall(b"and more")
        assert read_all(server, 15) == b"unread and more"
        rounds(client, server)
        switch(anew, "on", "redirected", "redirected-six")
        assert ways(anew, client) == [("tcp", "UNPAIRED")], "older than that"
        with anew.counted() as events, pair(anew) as new:
            rounds(client, server)
            rounds(*new)
        assert events["REDIRECTED"] == 40, "the new one's"


def test_cleanup_loses_no_byte(anew: Guarded) -> None:
    node = anew.node
    ours = pinned_programs(anew)
    with pair(anew) as (client, server):
        rounds(client, server)
        client.sendall(b"unread ")
        assert node.process is not None
        node.process.stop()
        done = node.shunt("cleanup", "--yes", "--bpffs", str(node.bpffs))
        assert done.code == 0
        assert f"removed {node.bpffs}/streams/links/shunt_streams" in done.out
        assert not node.bpffs.exists()
        assert not ours & attached_programs()
        with node.here.inside():
            client.sendall(b"and more")
        assert read_all(server, 15) == b"unread and more"
        rounds(client, server)
    node.start()


def test_what_sockets_hold_goes_with_them(anew: Guarded) -> None:
    """The map and its program name each other; that must not keep both for ever."""
    path = str(anew.node.bpffs / "streams/maps/sock_ends")
    shown = subprocess.run(
        ["bpftool", "-j", "map", "show", "pinned", path], capture_output=True, check=True
    )
    number = str(json.loads(shown.stdout)["id"])

    def exists() -> bool:
        asked = ["bpftool", "map", "show", "id", number]
        return subprocess.run(asked, capture_output=True, check=False).returncode == 0

    with pair(anew) as ends:
        rounds(*ends)
        switch(anew, "off", "redirected", "redirected-six")
        time.sleep(0.5)
        assert exists(), "the two ends have it"
    deadline = time.monotonic() + 30
    while exists():
        assert time.monotonic() < deadline, "the map is still there"
        time.sleep(0.2)


def test_without_sockets_it_is_told(anew: Guarded) -> None:
    node = anew.node
    usual = node.config.read_text()

    def problems() -> list[str]:
        return [p for p in node.shunt("status", "-o", "json").json["problems"] if "stream" in p]

    assert problems() == []
    node.config.write_text(usual + "sockets: off\n")
    node.until(lambda: problems() != [], "tells it")
    assert problems()[0].startswith("no stream of redirected, redirected-six is redirected")
    assert not node.shunt("status", "-o", "json").json["sockets"]["streams"]["attached"]
    node.config.write_text(usual)
    node.until(lambda: problems() == [], "redirects again")


def test_status_and_metrics(ours: Guarded) -> None:
    with pair(ours) as (client, server), pair(ours) as (bulk, reader):
        rounds(client, server)
        assert fill(bulk, b"x", BUDGET_MESSAGES + 1) == BUDGET_MESSAGES + 1
        read_all(reader, BUDGET_MESSAGES + 1)
        streams = ours.node.json("status")["sockets"]["streams"]
        assert (streams["redirected"], streams["tcp"]) == (1, 1)
        assert "1 redirected, 1 back on TCP" in ours.node.shunt("status").out
        metrics = ours.node.shunt("metrics").out
        assert 'shunt_streams{way="redirected"} 1' in metrics
        assert 'shunt_stream_events_total{event="paired"}' in metrics
    assert ours.node.json("status")["sockets"]["streams"]["redirected"] == 0


def test_status_sees_that_somebody_detached_a_program(anew: Guarded) -> None:
    fd = open_pin(anew.node.bpffs / "streams/links/shunt_streams")
    links.detach(fd)
    os.close(fd)
    shown = anew.node.shunt("status")
    assert shown.code == 1
    assert "redirect: a program has been detached from /sys/fs/cgroup" in shown.out
    assert anew.node.process is not None
    anew.node.process.stop()
    anew.node.start()
    with anew.counted() as events, pair(anew) as ends:
        rounds(*ends)
    assert events["REDIRECTED"] == 40


def test_maps_of_another_version_make_room(anew: Guarded) -> None:
    """Connections that have them go on by TCP."""
    node = anew.node
    with pair(anew) as (client, server):
        rounds(client, server)
        client.sendall(b"unread ")
        assert node.process is not None
        node.process.stop()
        path = node.bpffs / "streams/maps/stream_pairs"
        path.unlink()
        with Object(OBJECT) as other:
            other.set_entries({"stream_pairs": 1024})
            other.keep_programs()
            other.load()
            pin(other.maps["stream_pairs"].fd, path)
        node.start()
        client.sendall(b"and more")
        assert read_all(server, 15) == b"unread and more"
        rounds(client, server)
        with anew.counted() as events, pair(anew) as new:
            rounds(client, server)
            rounds(*new)
        assert events["REDIRECTED"] == 40, "the new one's"


def test_what_the_unit_allows_is_enough(anew: Guarded) -> None:
    """The capabilities of systemd/shuntd.service, first with new pins and then with those."""
    node = anew.node
    assert node.process is not None
    node.process.stop()
    assert node.shunt("cleanup", "--yes", "--bpffs", str(node.bpffs)).code == 0
    node.bpffs.mkdir()
    lines = (
        (Path(__file__).resolve().parents[2] / "systemd/shuntd.service").read_text().splitlines()
    )
    bounding = next(x for x in lines if x.startswith("CapabilityBoundingSet="))
    held = bounding.partition("=")[2].lower().replace("cap_", "").split()
    only = ",".join(["-all", *(f"+{name}" for name in held)])
    usual = node.argv
    limits = ["setpriv", f"--bounding-set={only}", "--inh-caps=-all"]
    node.argv = lambda *more: [*limits, *usual(*more)]  # type: ignore[method-assign]
    try:
        for _ in range(2):
            node.start()
            with anew.counted() as events, pair(anew) as ends:
                rounds(*ends)
            assert events["REDIRECTED"] == 40
            node.process.stop()
    finally:
        node.argv = usual  # type: ignore[method-assign]
