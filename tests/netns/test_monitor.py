# SPDX-License-Identifier: Apache-2.0
"""`shunt monitor`: its filters, and translations as they begin and end."""

from __future__ import annotations

import json
import select
from collections.abc import Callable
from typing import Any

import pytest

from shunt.cli.client import Client, Refused
from tests.netns.shunt_host import CLIENT, DIRECT, NAT, WEB, Host, watching


def seen(host: Host, act: Callable[[], None], *options: str) -> Any:
    """The first line of a monitor with these options, while `act` is done again and again."""
    with watching(host, "--count", "1", "-o", "json", *options) as watcher:

        def ended() -> bool:
            act()
            return watcher.poll() is not None

        host.until(ended, "sees one")
        out, err = watcher.communicate()
    assert (watcher.returncode, err) == (0, "")
    return json.loads(out)


@pytest.mark.parametrize(
    "options",
    [
        ("--service", "direct"),
        ("--backend", "10.9.0.3", "--service", "direct"),
        ("--from", "10.9.0.8/31", "--service", "direct"),
        ("--reason", "drop-ttl-expired", "--service", "direct"),
        ("--reason", "DROP_TTL_EXPIRED", "--service", "direct"),
    ],
)
def test_drops_are_filtered(host: Host, options: tuple[str, ...]) -> None:
    def drop() -> None:
        host.datagram(WEB, ttl=1)  # the noise
        host.datagram(DIRECT, ttl=1)

    found = seen(host, drop, *options)
    assert (found["service"], found["source"]) == ("direct", CLIENT)


@pytest.mark.parametrize(
    "options",
    [("--service", "web"), ("--backend", "10.9.9.9"), ("--from", "10.9.0.0/29"),
     ("--reason", "drop-no-backend")],
)  # fmt: skip
def test_others_are_not_shown(host: Host, options: tuple[str, ...]) -> None:
    """One that shows all ends, and by then the filtered one would have shown something."""
    with watching(host, *options) as watcher:

        def drop() -> None:
            host.datagram(DIRECT, ttl=1)

        for _ in range(3):
            seen(host, drop)
        assert watcher.poll() is None
        watcher.kill()
        assert watcher.communicate()[0] == ""


def test_translations_begin_and_end(own: Host) -> None:
    own.start()
    sockets = []

    def connect() -> None:
        sockets.append(own.connect(NAT))

    begun = seen(own, connect, "--type", "nat", "--service", "translated", "--from", "10.9.0.9")
    port = begun.pop("client_port")
    flow = next(f for f in own.json("nat", "list") if f["client_port"] == port)
    assert port in {s.getsockname()[1] for s in sockets}
    assert begun.pop("time") > 0
    assert begun == {
        "event": "created",
        "service": "translated",
        "protocol": "tcp",
        "client": CLIENT,
        "vip": NAT,
        "vip_port": 80,
        "own": "10.9.0.1",
        "own_port": flow["own_port"],
        "backend": "10.9.0.2:8080",
        "backend_port": 8080,
    }
    for each in sockets:
        each.close()


def test_as_people_see_them(own: Host) -> None:
    own.start()
    with watching(own, "--type", "nat") as watcher:
        out = watcher.stdout
        assert out is not None

        def told() -> bool:
            own.connect(NAT).close()
            return bool(select.select([out], [], [], 0)[0])

        own.until(told, "sees one begin")
        words = out.readline().split()
        assert words[1:3] == ["created", "tcp"]
        assert words[4:7] == [">", f"{NAT}:80", "as"]
        assert words[8:] == ["service", "translated", "backend", "10.9.0.2:8080"]
        own.shunt("flow", "flush", "--yes")
        while words[1] == "created":
            words = out.readline().split()
        assert words[1] == "ended"
        assert own.process is not None
        own.process.stop()  # a watcher does not keep it from ending
        assert "the stream has ended" in watcher.communicate(timeout=30)[1]


def test_what_makes_no_sense(host: Host) -> None:
    client = Client(host.sock)
    asked: list[tuple[dict[str, Any], int, str]] = [
        ({"type": "pass"}, 400, "drop, nat"),
        ({"service": "wob"}, 404, "no service wob"),
        ({"reason": "late"}, 400, "no reason to drop"),
        ({"network": "10.0.0.1/8"}, 400, "network 10.0.0.1/8"),
        ({"type": "nat", "reason": "drop-no-backend"}, 400, "no parameter reason"),
        ({"limit": 3}, 400, "no parameter limit"),
    ]
    for query, status, words in asked:
        with pytest.raises(Refused) as caught:
            next(client.stream("monitor", **query))
        assert caught.value.status == status
        assert words in str(caught.value)
        assert caught.value.fix
