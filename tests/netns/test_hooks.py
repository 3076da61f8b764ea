# SPDX-License-Identifier: Apache-2.0
"""Users' hooks with real packets and a real shuntd; the topology is shunt_host's.

```
    here                        outside
    eth0 10.9.0.1/24 ---------- eth0 10.9.0.9, and 192.0.2.9, .200, 198.51.100.9   clients
    shuntd, and a hook
```
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shunt.kern.maps import Map
from shunt.kern.program_array import ProgramArray
from shunt.xdp import hooks
from tests.netns import iproute
from tests.netns.shunt_host import CLIENT, NAT, SETTINGS, WEB, Host, refused

ROOT = Path(__file__).resolve().parents[2]
COUNTRY = ROOT / "examples/country.bpf.o"
DROPS, ANSWERS = (ROOT / f"tests/packets/hook_{name}.bpf.o" for name in ("drops", "answers"))
MARKS = ROOT / "tests/netns/marks.bpf.o"
SO_RCVMARK = 75  # asm-generic/socket.h
CLIENTS = ("192.0.2.9", "192.0.2.200", "198.51.100.9")


@pytest.fixture
def started(own: Host) -> Host:
    own.outside.ip(*(f"addr add {client}/32 dev eth0" for client in CLIENTS))
    own.outside.run("ethtool", "-K", "eth0", "gro", "on")  # or it drops what XDP sends
    own.write(
        "answered", {"name": "answered", "vip": WEB, "ports": ["81/udp"], "backends": ["10.9.0.2"]}
    )
    own.start()
    own.until(lambda: own.backend("web", "10.9.0.2")["state"] == "up", "finds its backends up")
    return own


def hook(host: Host, *argv: str) -> object:
    return host.json("hook", *argv, "--bpffs", str(host.bpffs))


def example(host: Host, *argv: str) -> str:
    """The example's own script, as a user starts it."""
    pins = host.bpffs / "hooks/pre-lb/country/maps"
    return subprocess.run(
        [sys.executable, str(ROOT / "examples/country.py"), "--pins", str(pins), *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT / "build/py")},
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip


def send(host: Host, client: str, count: int = 1, port: int = 53, to: str = WEB) -> None:
    with host.outside.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind((client, 0))
        for _ in range(count):
            sender.sendto(b"question", (to, port))


def reasons(host: Host) -> dict[str, int]:
    return {name: n["packets"] for name, n in host.json("status")["reasons"].items()}


def answers(host: Host, name: str) -> dict[str, int]:
    (found,) = [h for h in hook(host, "list") if h["name"] == name]  # type: ignore[attr-defined]
    return {key: found[key] for key in ("passed", "dropped", "invalid")}


def hook_metrics(host: Host) -> dict[str, float]:
    """Packets by answer, and by mark, of the hook `answers` at pre-lb; it is the only one."""
    found = {}
    for line in host.shunt("metrics").out.splitlines():
        if line.startswith("shunt_hook_"):
            labels = dict(re.findall(r'(\w+)="(\w+[\w-]*)"', line))
            assert (labels["hook"], labels["position"]) == ("answers", "pre-lb")
            found[labels.get("answer") or labels["mark"]] = float(line.split()[-1])
    return found


def program_ids(host: Host) -> set[int]:
    return {interface["program_id"] for interface in host.json("status")["interfaces"]}


def test_the_example_counts_by_country(started: Host) -> None:
    host = started
    loaded = hook(host, "load", str(COUNTRY), "--at", "pre-lb")
    assert isinstance(loaded, dict)
    assert (loaded["name"], loaded["maps"]) == ("country", ["countries", "prefixes"])
    assert example(host, "fill", str(ROOT / "examples/countries.csv")) == "6 prefixes\n"
    for client, count in zip(CLIENTS, (3, 5, 7), strict=True):
        send(host, client, count)
    bytes_each = 14 + 20 + 8 + len("question")

    def shown(counts: dict[str, int]) -> str:
        return "".join(f"{c}  {n} packets, {n * bytes_each} bytes\n" for c, n in counts.items())

    expected = shown({"AT": 5, "CH": 3, "NZ": 7})
    host.until(lambda: example(host, "show") == expected, f"counts {expected!r}")
    host.until(lambda: reasons(host)["SENT_TO_BACKEND"] >= 15, "balances as before")
    assert "DROP_HOOK" not in reasons(host)
    text = host.shunt("hook", "show", "country", "--bpffs", str(host.bpffs))
    assert text.lines("prefixes")[0].split() == ["prefixes", "lpm_trie", "20", "4", "65,536"]
    rows = hook(host, "show", "country", "--map", "countries")
    assert isinstance(rows, list)
    assert sorted(row["value"]["packets"] for row in rows)[-3:] == [3, 5, 7]


def test_a_hook_survives_what_shuntd_goes_through(started: Host) -> None:
    host = started
    hook(host, "load", str(ANSWERS), "--at", "post-lb", "--name", "closed")
    send(host, CLIENTS[0], 1, 81)
    host.until(lambda: answers(host, "closed")["dropped"] >= 1, "drops")

    def still_drops(what: str) -> None:
        before, gone = answers(host, "closed")["dropped"], reasons(host).get("DROP_HOOK", 0)
        send(host, CLIENTS[0], 4, 81)
        host.until(lambda: answers(host, "closed")["dropped"] >= before + 4, what)
        assert reasons(host)["DROP_HOOK"] >= gone + 4

    before = program_ids(host)
    host.json("program", "swap")
    assert program_ids(host).isdisjoint(before)
    still_drops("drops after a swap")
    assert host.process is not None
    host.process.stop()
    send(host, CLIENTS[0], 4, 81)  # nobody runs
    host.start()
    still_drops("drops after a restart")
    document = {"interfaces": ["eth0"], "limits": {"slots": 131072, "flows": 8192, "nat": 4096}}
    host.process.stop()
    host.config.write_text(json.dumps(document))
    host.start()
    still_drops("drops when maps have grown")
    hook(host, "unload", "closed")
    sent = reasons(host).get("SENT_TO_BACKEND", 0)
    dropped = reasons(host)["DROP_HOOK"]
    send(host, CLIENTS[0], 4, 81)
    host.until(lambda: reasons(host).get("SENT_TO_BACKEND", 0) >= sent + 4, "sends again")
    assert reasons(host)["DROP_HOOK"] == dropped
    assert hook(host, "list") == []
    assert not (host.bpffs / "hooks").exists()


def test_a_client_whose_hook_passes_is_served(started: Host) -> None:
    """Through both positions, a translated connection is opened: replies pass hooks too."""
    host = started
    host.until(lambda: host.backend("translated", "10.9.0.2:8080")["state"] == "up", "is up")
    for position in ("pre-lb", "post-lb"):
        hook(host, "load", str(ANSWERS), "--at", position, "--name", position)
    with host.outside.inside(), socket.socket() as client:
        client.settimeout(10)
        client.bind(("10.9.0.9", 0))
        client.connect((NAT, 80))
    assert answers(host, "pre-lb")["passed"] >= 2
    assert answers(host, "post-lb")["passed"] >= 2


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_a_mark_reaches_the_stack(own: Host, mode: str) -> None:
    """By way of the metadata and a TC program, to a socket of this host."""
    host = own
    host.config.write_text(json.dumps({**SETTINGS, "xdp": mode}))
    host.start()
    hook(host, "load", str(ANSWERS), "--at", "pre-lb")
    host.here.run("tc", "qdisc", "add", "dev", "eth0", "clsact")
    iproute.run(
        host.here,
        *("tc", "filter", "add", "dev", "eth0", "ingress", "bpf", "direct-action"),
        *("object-file", str(MARKS), "section", "tc"),
    )
    for port, mark in ((82, 7), (80, 0)):
        with (
            host.here.inside(),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        ):
            receiver.bind(("10.9.0.1", port))
            receiver.settimeout(15)
            receiver.setsockopt(socket.SOL_SOCKET, SO_RCVMARK, 1)
            send(host, CLIENT, 1, port, "10.9.0.1")
            _, ancillary, _, _ = receiver.recvmsg(100, socket.CMSG_SPACE(4))
        assert [int.from_bytes(data, sys.byteorder) for _, _, data in ancillary] == [mark]
    assert answers(host, "hook_answers")["passed"] >= 1


def test_what_a_crash_left_undone_is_done_by_the_next_start(started: Host) -> None:
    host = started
    hook(host, "load", str(ANSWERS), "--at", "post-lb", "--name", "late")
    maps = Map.pinned(host.bpffs / "maps" / "hooks")
    array = ProgramArray(maps.fd)
    for slot in range(4):  # the entry, and the hook's own: as if it had only been pinned
        array.clear(slot)
    host.json("program", "swap")
    before = answers(host, "late")["passed"]
    send(host, CLIENTS[0])
    host.until(lambda: answers(host, "late")["passed"] > before, "is in force again")
    # And the other way round: what is in a slot and pinned nowhere goes.
    hooks.remove_tree(host.bpffs / "hooks" / "post-lb")
    host.json("program", "swap")
    assert array.get(0) == array.get(3) == 0
    maps.close()


def test_a_hook_of_maps_that_are_gone_is_removed(started: Host) -> None:
    host = started
    hook(host, "load", str(DROPS), "--at", "pre-lb")
    assert host.process is not None
    host.process.stop()
    for pinned in (*(host.bpffs / "links").iterdir(), *(host.bpffs / "maps").iterdir()):
        pinned.unlink()
    host.start()
    assert "belongs to maps that are gone" in host.log.read_text()
    assert hook(host, "list") == []
    send(host, CLIENTS[0])
    host.until(lambda: reasons(host).get("SENT_TO_BACKEND", 0) >= 1, "balances")


def test_what_is_refused_changes_nothing(started: Host, tmp_path: Path) -> None:
    host = started
    there = ["--bpffs", str(host.bpffs)]
    hook(host, "load", str(ANSWERS), "--at", "pre-lb", "--name", "first")
    again = host.shunt("hook", "load", str(DROPS), "--at", "pre-lb", *there)
    refused(again, "there is hook first at pre-lb", "shunt hook unload first")
    again = host.shunt("hook", "load", str(DROPS), "--at", "post-lb", "--name", "first", *there)
    refused(again, "there is hook first at pre-lb")
    text = tmp_path / "hook.txt"
    text.write_text("")
    for file, words in (
        (tmp_path / "none.o", "there is no file"),
        (text, "ends neither in .c"),
        (DROPS.with_name("hook_redirects.bpf.o"), "bpf_redirect"),
        (DROPS.with_name("hook_strays.bpf.o"), "unbounded memory access"),
    ):
        done = host.shunt("hook", "load", str(file), "--at", "post-lb", "--name", "second", *there)
        refused(done, words)
    refused(
        host.shunt("hook", "load", str(DROPS), "--at", "post-lb", "--name", "A b", *there), "name"
    )
    refused(host.shunt("hook", "unload", "second", *there), "there are: first")
    refused(host.shunt("hook", "show", "first", "--map", "x", *there), "it has: seen")
    assert sorted(path.name for path in (host.bpffs / "hooks").iterdir()) == ["pre-lb"]
    before = answers(host, "first")["passed"]
    send(host, CLIENTS[0])
    host.until(lambda: answers(host, "first")["passed"] > before, "goes on with the first")


def test_cleanup_removes_hooks(started: Host) -> None:
    host = started
    hook(host, "load", str(COUNTRY), "--at", "pre-lb")
    assert host.process is not None
    host.process.stop()
    done = host.shunt("cleanup", "--yes", "--bpffs", str(host.bpffs))
    assert done.code == 0
    assert f"removed {host.bpffs}/hooks/pre-lb/country" in done.out
    assert not host.bpffs.exists()
    assert not host.attached()


def test_without_a_balancer(own: Host) -> None:
    own.process = None
    done = own.shunt("hook", "load", str(DROPS), "--at", "pre-lb", "--bpffs", str(own.bpffs))
    refused(done, "no balancer is loaded", "start shuntd")
    assert hook(own, "list") == []
