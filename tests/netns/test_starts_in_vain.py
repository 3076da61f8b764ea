# SPDX-License-Identifier: Apache-2.0
"""A shuntd that cannot start says what, why, and how to mend it, and what forwards goes on.

The hosts are in shunt_host: a client's connection to NAT, which needs no more of a backend than
that it listens, is what goes on.
"""

from __future__ import annotations

import json
import os
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from shunt.kern.maps import Map
from shunt.lab.napi import attach_pass
from tests.netns import iproute
from tests.netns.shunt_host import CLIENT, NAT, SETTINGS, Host, refused

ROOT = Path(__file__).resolve().parents[2]
# Anybody else may not even be able to enter the checkout.
OWNER = str(ROOT.stat().st_uid)
OTHER = str(ROOT / "tests" / "packets" / "headroom.bpf.o")
BEHIND_NAT = "10.9.0.2:8080"
# Hosts that lack something: how a process there is started, and what it has to say.
LACKING = {
    "btf": (
        ("unshare", "--mount", "--propagation", "private", "sh", "-ec",
         'mount -t tmpfs none /sys/kernel/btf; exec "$0" "$@"'),
        ("the kernel does not describe its types (BTF)",
         "/sys/kernel/btf/vmlinux does not exist",
         "boot a kernel with CONFIG_DEBUG_INFO_BTF"),
    ),
    "kernel": (
        ("setarch", platform.machine(), "--uname-2.6"),
        ("the kernel 2.6.", "this is Linux 2.6.", "boot Linux 6.1 or later"),
    ),
    "privileges": (
        ("setpriv", f"--reuid={OWNER}", "--clear-groups", "--bounding-set=-all"),
        ("Shunt is not allowed to load BPF programs and to change the network",
         "this process lacks CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF",
         "run it as root"),
    ),
}  # fmt: skip


def in_vain(host: Host, *before: str) -> tuple[str, str, str]:
    """Start a daemon that must not come up; its what, why and fix."""
    done = host.here.run(*before, *host.argv(), check=False, timeout_s=60)
    assert (done.returncode, done.stdout) == (1, ""), done
    what, why, fix = done.stderr.splitlines()[-3:]  # after what it logged
    for line, beginning in ((what, "shuntd: "), (why, "  why: "), (fix, "  fix: ")):
        assert line.startswith(beginning), done.stderr
    return what, why, fix


def program(host: Host) -> int:
    """The id of the XDP program on eth0; 0 if there is none."""
    shown = host.here.run("ip", "-j", "link", "show", "dev", "eth0").stdout
    return int(json.loads(shown)[0].get("xdp", {}).get("prog", {}).get("id", 0))


def take(host: Host, interface: str) -> None:
    """Attach somebody else's program."""
    iproute.run(
        *(host.here, "ip", "link", "set", "dev", interface, "xdp", "obj", OTHER, "sec", "xdp")
    )


def start(host: Host) -> None:
    """Start the daemon, and wait until it has found out that NAT's backend is up."""
    host.start()
    host.until(lambda: host.backend("translated", BEHIND_NAT)["state"] == "up", "finds it up")


def serves(host: Host) -> bool:
    """Whether a new connection is answered by way of the program."""
    woken = attach_pass(host.outside, "eth0")
    try:
        with host.outside.inside(), socket.create_connection((NAT, 80), 10, (CLIENT, 0)) as client:
            return bool(client.getpeername() == (NAT, 80))
    finally:
        os.close(woken)


@contextmanager
def goes_on(host: Host) -> Iterator[None]:
    """What is attached stays, and serves."""
    before = program(host)
    assert before
    assert serves(host)
    yield
    assert program(host) == before
    assert serves(host)


@pytest.mark.parametrize("missing", LACKING)
def test_beside_a_daemon_on_a_host_that_lacks(host: Host, missing: str) -> None:
    before, said = LACKING[missing]
    generation = host.json("status")["generation"]
    with goes_on(host):
        for found, words in zip(in_vain(host, *before), said, strict=True):
            assert words in found
    assert host.json("status")["generation"] == generation


def test_nothing_is_made_on_a_host_that_lacks_something(own: Host) -> None:
    before, _ = LACKING["kernel"]
    in_vain(own, *before)
    assert not program(own)
    assert not own.bpffs.exists()
    assert not own.run.exists()


def test_pins_of_another_version(own: Host) -> None:
    start(own)
    assert own.process is not None
    own.process.kill()
    meta = Map.pinned(own.bpffs / "maps" / "meta")
    try:
        version = int(meta.mapped()["abi"][0])
        meta.mapped()["abi"] = version + 70
        with goes_on(own):
            what, why, fix = in_vain(own)
        assert f"the maps pinned in {own.bpffs}/maps are of version {version + 70}" in what
        assert f"this shuntd is of version {version}" in why
        assert "`shunt cleanup`" in fix
        meta.mapped()["abi"] = version
    finally:
        meta.close()
    start(own)  # and it was only that
    assert serves(own)


def test_an_interface_that_is_down_or_taken(own: Host) -> None:
    own.here.ip("link set eth0 down")
    what, _, fix = in_vain(own)
    assert "interface eth0 is down" in what
    assert "ip link set" in fix
    assert not program(own)
    own.here.ip("link set eth0 up")
    take(own, "eth0")
    holder = program(own)
    what, _, fix = in_vain(own)
    assert "eth0 already has XDP program " in what
    assert "detach" in fix
    assert program(own) == holder
    own.here.ip("link set dev eth0 xdp off")
    start(own)  # both fixes help
    assert serves(own)


def test_a_running_daemon_is_given_an_interface_it_cannot_have(own: Host) -> None:
    """The change is refused with the reason, and what forwards goes on."""
    start(own)
    generation = own.json("status")["generation"]
    own.config.write_text(yaml.safe_dump({**SETTINGS, "interfaces": ["eth0", "eth1"]}))

    def is_refused(said: str) -> None:
        done = own.shunt("config", "reload")
        refused(done, said, f"generation {generation} is still in force")
        assert program(own)
        assert serves(own)

    is_refused("eth1 does not exist")
    own.here.ip("link add eth1 type veth peer name peer1")
    is_refused("interface eth1 is down")
    own.here.ip("link set eth1 up")
    take(own, "eth1")
    is_refused("eth1 already has XDP program ")
