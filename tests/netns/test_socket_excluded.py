# SPDX-License-Identifier: Apache-2.0
"""Who sees VIPs as they are: control groups and services that are left out; and containers.

socket_node.py draws the node.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from shunt.kern import cgroup, links
from shunt.kern.objects import open_pin
from tests.netns.own_vips import vip4, vip6
from tests.netns.socket_node import BE1, BE2, SIX1, SIX2, Node, a_node, say, say_to

UDP = socket.SOCK_DGRAM
PID = os.getpid()
OUT = f"shunt-out-{PID}"
NOWHERE, SIX, APART = vip4(1), vip6(1), vip4(2)
PORTS = [7, "7/udp"]
APART_SERVICE = {"name": "apart", "vip": APART, "ports": PORTS, "backends": [BE1]}
# A process of its own: into a control group, and then to each VIP by each call.
CLIENT = """
import json, os, socket, sys
group, *vips = sys.argv[1:]
if group:
    open(group + "/cgroup.procs", "w").write(str(os.getpid()))
found = {}
for vip in vips:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        sock = socket.socket(socket.AF_INET6 if ":" in vip else socket.AF_INET, kind)
        sock.settimeout(5)
        try:
            sock.connect((vip, 7))
            sock.sendall(b"hello\\n")
            answer = [sock.recv(99).split()[0].decode(), sock.getpeername()[0]]
        except OSError as e:
            answer = e.errno
        found[f"{vip} {kind.name}"] = answer
    sock = socket.socket(socket.AF_INET6 if ":" in vip else socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(5)
    try:
        sock.sendto(b"hello", (vip, 7))
        data, peer = sock.recvfrom(99)
        answer = [data.split()[0].decode(), peer[0]]
    except OSError as e:
        answer = e.errno
    found[f"{vip} sendto"] = answer
print(json.dumps(found))
"""


@contextlib.contextmanager
def groups(*names: str) -> Iterator[list[Path]]:
    """Control groups below the root, the outer ones first; gone afterwards."""
    made = [cgroup.root() / name for name in names]
    try:
        for path in made:
            path.mkdir()
        yield made
    finally:
        for path in reversed(made):
            deadline = time.monotonic() + 10
            while path.exists():
                try:
                    path.rmdir()
                except OSError:
                    assert time.monotonic() < deadline, "somebody is still in it"
                    time.sleep(0.02)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with a_node("sockout", dns=False) as node:
        for name, vip, backends in (("our4", NOWHERE, [BE1, BE2]), ("our6", SIX, [SIX1, SIX2])):
            node.write(name, {"name": name, "vip": vip, "ports": PORTS, "backends": backends})
        node.write("apart", {**APART_SERVICE, "sockets": "off"})
        node.settings(sockets={"exclude": [f"/{OUT}"]})
        node.start()
        yield node


def talk(
    node: Node, group: Path | str = "", *vips: str, wrap: Sequence[str] = ()
) -> dict[str, Any]:
    """What becomes of each call of a process in a control group."""
    argv = [*node.here.enter, *wrap, sys.executable, "-c", CLIENT, str(group)]
    done = subprocess.run(
        [*argv, *(vips or (NOWHERE,))], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def is_translated(found: dict[str, Any]) -> bool:
    """Each call, or none; what is in between fails."""
    reached = {isinstance(answer, list) for answer in found.values()}
    assert len(reached) == 1, found
    if reached == {False}:
        assert set(found.values()) == {errno.ENETUNREACH}, found  # nobody else knows the VIP
        return False
    for call, (name, peer) in found.items():
        assert name in {"be1", "be2"}
        assert peer == call.split()[0], "the VIP is shown"
    return True


def there(node: Node) -> list[bool]:
    shown = node.json("status")["sockets"]["excluded_cgroups"]
    return [bool(each["there"]) for each in shown]


# Control groups ------------------------------------------------------------------------------


def test_processes_of_an_excluded_group_and_below_see_the_vip(node: Node) -> None:
    other = f"{OUT}-not"  # whose name begins like it
    with groups(OUT, f"{OUT}/a", f"{OUT}/a/b", other) as (out, inner, innermost, beside):
        node.until(lambda: there(node) == [True], "is seen")
        before = node.calls().get("PASS_CGROUP", 0)
        for group in (out, inner, innermost):
            assert not is_translated(talk(node, group, NOWHERE, SIX))
        assert node.calls()["PASS_CGROUP"] == before + 18
        for group in (beside, Path()):
            assert is_translated(talk(node, "" if group == Path() else group, NOWHERE, SIX))
        told = node.shunt("status").out
        assert f"not those of /{OUT}\n" in told
    node.until(lambda: there(node) == [False], "is gone")
    assert f"not those of /{OUT} (not there)\n" in node.shunt("status").out


def test_a_group_that_comes_again_is_excluded_again(node: Node) -> None:
    """A container that is restarted has another group of the same name."""
    for _ in range(5):
        with groups(OUT) as (out,):
            node.until(lambda: there(node) == [True], "is seen")
            assert not is_translated(talk(node, out))
        node.until(lambda: there(node) == [False], "is gone")


def test_what_it_had_before_goes_on(node: Node) -> None:
    with groups(OUT) as (out,), node.connected(NOWHERE) as tcp, node.client(kind=UDP) as udp:
        node.until(lambda: there(node) == [True], "is seen")
        name, first = say(tcp), say_to(udp, NOWHERE)
        try:
            (out / "cgroup.procs").write_text(str(os.getpid()))
            assert (say(tcp), tcp.getpeername()) == (name, (NOWHERE, 7))
            with pytest.raises(OSError, match="unreachable"):
                udp.sendto(b"hello", (NOWHERE, 7))
        finally:
            (cgroup.root() / "cgroup.procs").write_text(str(os.getpid()))
        assert say_to(udp, NOWHERE)[1] == first[1]


def test_while_nothing_is_excluded_no_group_is_asked_for(node: Node) -> None:
    """The price of the switch: not an instruction."""

    def asks() -> bool:
        link = open_pin(node.bpffs / "sockets/links/shunt_connect4")
        try:
            _, program = links.cgroup_info(link)
        finally:
            os.close(link)
        argv = ["bpftool", "prog", "dump", "xlated", "id", str(program)]
        text = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
        return "bpf_get_current_ancestor_cgroup_id" in text

    assert asks()
    node.settings()
    try:
        assert not asks()
        assert node.json("status")["sockets"]["excluded_cgroups"] == []
        with groups(OUT) as (out,):
            assert is_translated(talk(node, out))
    finally:
        node.settings(sockets={"exclude": [f"/{OUT}"]})


def test_while_the_daemon_is_away(node: Node) -> None:
    assert node.process is not None
    with groups(OUT) as (out,):
        node.until(lambda: there(node) == [True], "is seen")
        node.process.kill()
        assert not is_translated(talk(node, out))
        assert is_translated(talk(node))
        node.start()
        assert not is_translated(talk(node, out))
        assert is_translated(talk(node))


# Services ------------------------------------------------------------------------------------


def test_a_service_whose_vip_sockets_see(node: Node) -> None:
    before = node.calls().get("PASS_SERVICE", 0)
    assert not is_translated(talk(node, "", APART))
    assert node.calls()["PASS_SERVICE"] == before + 3
    assert node.json("status")["sockets"]["excluded_services"] == ["apart"]
    assert "not to apart\n" in node.shunt("status").out
    assert node.json("service", "show", "apart")["sockets"] is False
    assert "see the VIP itself" in node.shunt("service", "show", "apart").out
    node.write("apart", APART_SERVICE)
    node.until(lambda: is_translated(talk(node, "", APART)), "is live")
    assert node.json("status")["sockets"]["excluded_services"] == []
    node.write("apart", {**APART_SERVICE, "sockets": "off"})
    node.until(lambda: not is_translated(talk(node, "", APART)), "is live")


# Containers ----------------------------------------------------------------------------------


def nested(group: Path, inner: str) -> list[str]:
    """A control group, seen as the root in namespaces of their own, with a mount of cgroup v2 there
    and nothing else of the host's hierarchy."""
    root = cgroup.root()
    script = (
        f"echo $$ > {group}/cgroup.procs; exec unshare --cgroup --mount sh -ec '"
        f"mount -t tmpfs none {root}; mount -t cgroup2 none {root}; {inner}"
        """ exec "$@"' sh "$@" """
    )
    return ["sh", "-ec", script, "sh"]


def test_a_process_in_nested_namespaces_is_covered(node: Node) -> None:
    name = f"shunt-nest-{os.getpid()}"
    with groups(name, f"{name}/in") as (group, inside):
        wrap = nested(group, "test ! -e in/../../cgroup.procs; ")
        assert is_translated(talk(node, "", NOWHERE, SIX, wrap=wrap))
        # In a group that it made itself, by the path that it sees.
        seen = str(cgroup.root() / "in")
        assert is_translated(talk(node, seen, NOWHERE, SIX, wrap=wrap))
        assert inside.exists()


def test_a_process_in_nested_namespaces_of_an_excluded_group_is_not(node: Node) -> None:
    with groups(OUT, f"{OUT}/pod", f"{OUT}/pod/in") as (_, pod, _inside):
        node.until(lambda: there(node) == [True], "is seen")
        wrap = nested(pod, "")
        assert not is_translated(talk(node, "", wrap=wrap))
        assert not is_translated(talk(node, str(cgroup.root() / "in"), wrap=wrap))


@contextlib.contextmanager
def started_in(node: Node, wrap: list[str]) -> Iterator[None]:
    """shuntd behind other words."""
    assert node.process is not None
    node.process.stop()
    assert node.shunt("cleanup", "--yes", "--bpffs", str(node.bpffs)).code == 0
    node.bpffs.mkdir()
    usual = node.argv
    node.argv = lambda *more: [*wrap, *usual(*more)]  # type: ignore[method-assign]
    try:
        node.start()
        yield
    finally:
        node.argv = usual  # type: ignore[method-assign]
        assert node.process is not None
        node.process.stop()
        assert node.shunt("cleanup", "--yes", "--bpffs", str(node.bpffs)).code == 0
        node.bpffs.mkdir()
        node.start()


def test_a_daemon_in_a_container_covers_the_container(node: Node) -> None:
    name = f"shunt-nest-{os.getpid()}"
    with groups(name, f"{name}/in") as (group, inside), started_in(node, nested(group, "")):
        shown = node.json("status")["sockets"]
        assert (shown["attached"], shown["whole"]) == (True, False)
        assert "(a container's part of the hierarchy)" in node.shunt("status").out
        assert is_translated(talk(node, group))
        assert is_translated(talk(node, inside))
        assert not is_translated(talk(node))
    assert node.json("status")["sockets"]["whole"]


def test_cgroup_v2_alone(node: Node) -> None:
    """As hosts with systemd have it: no hierarchy of version 1, and this one in their place."""
    others = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()
              if line.split()[2] in {"cgroup", "cgroup2"}]  # fmt: skip
    away = "; ".join(f"umount {each}" for each in others)
    script = f'{away}; mount -t cgroup2 cgroup2 /sys/fs/cgroup; exec "$@"'
    with started_in(node, ["unshare", "--mount", "sh", "-ec", script, "sh"]):
        shown = node.json("status")["sockets"]
        assert (shown["cgroup"], shown["attached"], shown["whole"]) == (
            "/sys/fs/cgroup", True, True,
        )  # fmt: skip
        assert is_translated(talk(node, "", NOWHERE, SIX))
        with groups(OUT) as (out,):
            node.until(lambda: there(node) == [True], "is seen")
            assert not is_translated(talk(node, out))


# What the kernel itself sends, and protocols beside TCP and UDP ------------------------------


def a_socket(node: Node, kind: int, protocol: int) -> socket.socket:
    """Of a protocol that not every kernel has."""
    try:
        with node.here.inside():
            made = socket.socket(socket.AF_INET, kind, protocol)
    except OSError as e:
        pytest.skip(f"this kernel has no protocol {protocol}: {e}")
    made.settimeout(5)
    return made


def test_the_kernels_own_sockets_are_asked_too(node: Node) -> None:
    """MPTCP's are made and connected by the kernel, as those of NFS and SMB mounts are: `sockets:
    off` of a service leaves them alone."""
    with a_socket(node, socket.SOCK_STREAM, socket.IPPROTO_MPTCP) as sock:
        sock.connect((NOWHERE, 7))
        assert say(sock) in {"be1", "be2"}
        assert sock.getpeername()[0] == NOWHERE
    sock = a_socket(node, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
    with sock, pytest.raises(OSError, match="unreachable"):
        sock.connect((APART, 7))


def test_udp_lite_is_no_udp(node: Node) -> None:
    """Another protocol, whatever its ports: no service has them."""
    with node.connected(NOWHERE, kind=UDP) as udp:
        assert say(udp) in {"be1", "be2"}
    for call in ("connect", "sendto"):
        with a_socket(node, UDP, 136) as sock, pytest.raises(OSError, match="unreachable"):
            sock.connect((NOWHERE, 7)) if call == "connect" else sock.sendto(b"x", (NOWHERE, 7))
    with a_socket(node, UDP, 136) as sock:
        sock.bind(("10.9.1.1", 30080))
        sock.connect((BE1, 7))
        assert sock.getpeername() == (BE1, 7)
