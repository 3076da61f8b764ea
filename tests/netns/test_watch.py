# SPDX-License-Identifier: Apache-2.0
"""Changes told as they come, on a real shuntd; the hosts are in shunt_host."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from shunt.agent.api_types import Change
from shunt.cli.client import Client, Refused
from tests.netns.shunt_host import SERVICES, Host

Json = dict[str, Any]


def until(stream: Iterator[Json], wanted: Callable[[Json], bool]) -> list[Json]:
    """What comes, up to what is wanted. pytest's own time limit bounds the wait."""
    seen = []
    for change in stream:
        msgspec.convert(change, Change, strict=True)
        seen.append(change)
        if wanted(change):
            return seen
    raise AssertionError(f"the stream has ended: {seen[-3:]}")


def is_synced(change: Json) -> bool:
    return bool(change["type"] == "synced")


@contextmanager
def following(host: Host, *options: str) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-m", "shunt.cli.main", "--socket", str(host.sock)]
    watcher = subprocess.Popen(
        [*argv, "service", "list", "--watch", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield watcher
    finally:
        watcher.kill()
        watcher.communicate()


def test_a_watcher_sees_how_it_is_and_what_changes(host: Host) -> None:
    stream = Client(host.sock).stream("watch")
    first = until(stream, is_synced)
    assert first[0]["type"] == "snapshot"
    services = {c["service"] for c in first if c["type"] == "service"}
    assert services == set(SERVICES)
    web = [c for c in first if c["type"] == "backend" and c["service"] == "web"]
    assert {(c["backend"], c["state"], c["weight"]) for c in web} == {
        ("10.9.0.2", "up", 1), ("10.9.0.3", "up", 3),
    }  # fmt: skip
    host.json("backend", "drain", "web", "10.9.0.2")
    try:
        drained = until(stream, lambda c: c.get("state") == "draining")[-1]
        assert (drained["service"], drained["backend"], drained["change"]) == (
            *("web", "10.9.0.2"), "changed",
        )  # fmt: skip
    finally:
        host.json("backend", "undrain", "web", "10.9.0.2")
    until(stream, lambda c: c.get("backend") == "10.9.0.2" and c.get("state") == "up")
    host.json("service", "add", "extra", "--vip", "203.0.113.40", "--port", "80")
    added = until(stream, lambda c: c.get("service") == "extra")[-1]
    assert (added["change"], added["vips"], added["origin"]) == ("added", ["203.0.113.40"], "api")
    assert host.shunt("service", "remove", "extra").code == 0
    gone = until(stream, lambda c: c.get("service") == "extra" and c["change"] == "removed")[-1]
    assert gone["revision"] > added["revision"] > drained["revision"]


def test_a_watcher_goes_on_where_it_was(host: Host) -> None:
    client = Client(host.sock)
    at = until(client.stream("watch"), is_synced)[-1]["revision"]
    host.json("backend", "weight", "web", "10.9.0.2", "9")
    host.json("backend", "weight", "web", "10.9.0.2", "--reset")
    seen = until(client.stream("watch", since=at), is_synced)
    assert [c.get("weight") for c in seen if c.get("service") == "web"] in ([9, 1], [])
    revisions = [c["revision"] for c in seen[:-1]]
    assert revisions == list(range(at + 1, at + 1 + len(revisions)))
    # Of another daemon, or of long ago: how it is, first.
    for since in (1, at + 1_000_000):
        assert until(client.stream("watch", since=since), is_synced)[0]["type"] == "snapshot"
    with pytest.raises(Refused, match="is no revision"):
        next(client.stream("watch", since="yesterday"))


def test_the_command_follows(own: Host) -> None:
    own.start()
    with following(own) as people, following(own, "-o", "json") as programs:
        assert people.stdout is not None
        assert programs.stdout is not None
        until(map(json.loads, programs.stdout), is_synced)
        lines = iter(people.stdout)
        next(said for said in lines if said.startswith("service web present: "))
        own.write("new", {"name": "new", "vip": "203.0.113.41", "ports": [80], "backends": []})
        assert own.shunt("config", "reload").code == 0
        assert next(s for s in lines if "service new" in s) == (
            "service new added: 203.0.113.41 80/tcp dsr-ipip\n"
        )
        until(map(json.loads, programs.stdout), lambda c: c.get("service") == "new")
        assert own.process is not None
        assert own.process.stop() == 0
        assert people.wait(20) == programs.wait(20) == 3
