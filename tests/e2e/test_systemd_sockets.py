# SPDX-License-Identifier: Apache-2.0
"""Sockets of a booted machine and of its pods, under shuntd's unit and with its drop-in for other
network namespaces (systemd/namespaces.conf). tests/e2e/pods.py draws the machine.

The tests build on one another, in the order of this file.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from shunt.agent.events import Event
from shunt.lab.shuntd import SETTINGS
from tests.e2e.installed import Installed
from tests.e2e.machine import ROOT, Machine
from tests.e2e.pods import Pods
from tests.scenes import lab_with_servers

# The first of all makes a machine's root file system.
pytestmark = pytest.mark.timeout(1200)

VIP, STREAMED = "203.0.113.60", "203.0.113.61"
BE1, BE2 = "10.0.0.101", "10.0.0.102"
NAMES = {"name": "names", "vip": VIP, "ports": ["7/udp"], "backends": [BE1, BE2]}
ALL = {**SETTINGS, "sockets": {"cover": "all"}}
INSTALLED = "/usr/local/share/shunt/namespaces.conf"
DROP_INS = "/etc/systemd/system/shuntd.service.d"
TRIAL = "/run/systemd/system/shuntd.service.d"  # read after DROP_INS, by the names in them
BARRED = "connections to backends that have gone are not closed in other network namespaces"
# `systemd-analyze security`, with the drop-in.
EXPOSURE_MAX = 3.0


@dataclass
class Scene(Installed):
    pods: Pods

    def closing(self) -> Any:
        return self.status(check=False)["sockets"]["closing"]

    def metric(self, name: str) -> float | None:
        found = re.search(rf"^{name} (.*)$", self.machine.run("shunt", "metrics"), re.MULTILINE)
        return float(found[1]) if found else None

    def doctor(self) -> Any:
        """What it finds of other namespaces."""
        found = json.loads(self.machine.run("shunt", "doctor", "-o", "json", check=False))
        return [each for each in found if each["check"] == "other namespaces"]

    def restart(self) -> None:
        self.machine.shell("systemctl daemon-reload && systemctl restart shuntd")

    @contextlib.contextmanager
    def trial(self, *lines: str) -> Iterator[None]:
        """With these lines in shuntd's unit."""
        self.machine.run("mkdir", "-p", TRIAL)
        self.machine.write(f"{TRIAL}/trial.conf", "\n".join(["[Service]", *lines, ""]))
        self.restart()
        try:
            yield
        finally:
            self.machine.run("rm", "-r", TRIAL)
            self.restart()

    @contextlib.contextmanager
    def on_be2(self, *where: str) -> Iterator[dict[str, str]]:
        """Programs there have be2 for the VIP; by where, their sockets' ports."""
        self.serve(NAMES)
        try:
            ports = {}
            for place in where:
                asked = ("udp", VIP, "7", "--until", "be2")
                ports[place] = self.pods.ask(program(place), place, *asked)[0]
            yield ports
        finally:
            self.pods.stop()

    def gone(self) -> None:
        """be2 is, from the tables; it still answers whoever asks it."""
        self.serve({**NAMES, "backends": [BE1]})

    def await_aborted(self, *where: str) -> None:
        """Each is told so, and has the other backend then."""
        for place in where:
            self.pods.until_answered_by("be1", program(place))
            told = self.pods.said(program(place))[1:]
            errors = [said for said in told if said not in {"be1", "be2"}]
            # The one from recv(), the other from send().
            assert set(errors) <= {"ECONNABORTED", "EDESTADDRREQ"}
            end = told.index(errors[0])
            assert set(told[:end]) == {"be2"}
            assert "be2" not in told[end:]

    def goes_on(self, *where: str) -> None:
        """Each still has be2, and always had."""
        for place in where:
            self.pods.until_more(program(place))
            assert set(self.pods.said(program(place))[1:]) == {"be2"}


def program(where: str) -> str:
    return f"asks-{where or 'host'}"


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        lab, _ = stack.enter_context(lab_with_servers((), balancer_count=1, backend_count=2))
        machine = stack.enter_context(Machine(lab, lab.balancers[0]))
        pods = Pods(machine, lab)
        pods.add()  # before the daemon's own view of the file system is made
        made = Scene(machine, pods)
        made.install(ALL, [NAMES])
        pods.add()
        yield made


# As it is installed ---------------------------------------------------------------------------


def test_the_unit_says_what_it_does_not_do(scene: Scene) -> None:
    shown = scene.machine.run("shunt", "status")  # exit code 0: nothing is wrong yet
    assert "of all network namespaces" in shown
    assert "NOT CLOSED in every network namespace after backends went: see below" in shown
    told = scene.closing()["barred"]
    assert told["what"] == BARRED
    assert "CAP_SYS_ADMIN is missing" in told["why"]
    assert "CAP_SYS_PTRACE is missing" in told["why"]
    assert f"{BARRED}\n  why: {told['why']}\n  fix: {told['fix']}\n" in shown + "\n"
    (found,) = scene.doctor()
    assert (found["level"], found["what"], found["fix"]) == ("warn", BARRED, told["fix"])
    assert scene.metric("shunt_sockets_elsewhere_closed") == 0
    warnings = [r["MESSAGE"] for r in scene.records("PRIORITY=4") if BARRED in r["MESSAGE"]]
    assert len(warnings) == 1
    assert told["fix"] in warnings[0]
    # The file says the same, where it is installed; and so does the documentation.
    commented = re.sub(r"\\?\n# *", "", scene.machine.run("cat", INSTALLED))
    assert " ".join(told["fix"].split()) in " ".join(commented.split())
    documented = " ".join((ROOT / "docs/operations.md").read_text().replace("\\\n", "").split())
    assert told["fix"] in documented


def test_only_its_own_namespace_is_swept(scene: Scene) -> None:
    with scene.on_be2("", "pod1"):
        scene.gone()
        scene.await_aborted("")
        scene.machine.until(lambda: scene.closing()["left"] == 1, "knows of the other")
        scene.goes_on("pod1")
        assert scene.closing()["udp"] == 1
        shown = scene.machine.run("shunt", "status", check=False)
        assert "closed after backends went: 1 UDP; 1 cannot be closed" in shown
        assert "network namespaces cannot be entered: Operation not permitted" in shown
        assert any(
            "cannot be closed: 1" in problem for problem in scene.status(check=False)["problems"]
        )
        assert scene.metric("shunt_sockets_stale") == 1


# With the drop-in -----------------------------------------------------------------------------


def admitted(scene: Scene) -> set[str]:
    """To who runs in the unit's sandbox with its capabilities."""
    tried = f"/usr/bin/python3 {ROOT}/tests/e2e/clients/admitted.py"
    into = "/var/lib/shunt/admitted"
    with scene.trial(f"ExecStartPre=/bin/sh -c '{tried} >{into}'"):
        return set(scene.machine.shell(f"cat {into}; rm {into}").splitlines())


def test_activated_by_the_command_that_is_told(scene: Scene) -> None:
    """What was left before is closed by the start; it was while shuntd could not."""
    assert admitted(scene) == set()
    with scene.on_be2("pod1"):
        scene.gone()
        scene.goes_on("pod1")
        scene.machine.shell(scene.closing()["barred"]["fix"])
        scene.await_aborted("pod1")
    assert scene.machine.run("ls", DROP_INS).split() == ["namespaces.conf"]
    scene.machine.until(lambda: scene.closing()["left"] == 0, "has none left")
    assert scene.closing()["barred"] is None
    assert "see below" not in scene.machine.run("shunt", "status")
    assert [each["level"] for each in scene.doctor()] == ["ok"]
    assert scene.metric("shunt_sockets_elsewhere_closed") == 1


def test_the_drop_in_admits_what_is_needed_and_no_more(scene: Scene) -> None:
    """To make an empty network namespace by clone() goes with setns(): systemd has one switch."""
    assert admitted(scene) == {"setns net", "clone net"}
    status = scene.machine.run("cat", f"/proc/{scene.pid()}/status")
    (effective,) = re.findall(r"^CapEff:\s*(.*)$", status, re.MULTILINE)
    names = scene.machine.run("capsh", f"--decode={effective}").strip().partition("=")[2]
    assert {"cap_sys_admin", "cap_sys_ptrace"} < set(names.split(","))
    assert len(names.split(",")) == 8
    shown = scene.machine.run("systemd-analyze", "security", "--no-pager", "shuntd")
    (exposure,) = re.findall(r"Overall exposure level for shuntd.service: ([\d.]+)", shown)
    assert float(exposure) <= EXPOSURE_MAX


@contextlib.contextmanager
def same_addresses(scene: Scene, port: str) -> Iterator[str]:
    """A namespace apart, without a VIP: a client with pod1's address and `port`, and its server
    with be2's. Gives the client's program."""
    scene.machine.shell(f"""set -e
        ip netns add apart
        ip -n apart link set lo up
        ip -n apart addr add 10.77.1.2/32 dev lo
        ip -n apart addr add {BE2}/32 dev lo""")
    scene.pods.serve("be2", "apart")
    scene.machine.until(
        lambda: ":7 " in scene.machine.run("ip", "netns", "exec", "apart", "ss", "-lnu"), "serves"
    )
    scene.pods.ask(program("apart"), "apart", "udp", BE2, "7", "--from", f"10.77.1.2:{port}")
    try:
        yield "apart"
    finally:
        scene.pods.stop("be2", program("apart"))
        scene.pods.forget("apart")


def test_pods_with_and_without_a_name(scene: Scene) -> None:
    """S71, S73: whoever had the backend that went, and nobody else: neither who is connected to it
    without the VIP, nor a socket apart that has all of a closed one's addresses and ports."""
    before, nameless = scene.closing()["udp"], scene.pods.add()
    where = ("", "pod1", "pod2", nameless)
    with scene.on_be2(*where) as ports, same_addresses(scene, ports["pod1"]) as apart:
        scene.pods.ask(program("direct"), "pod1", "udp", BE2, "7")
        scene.pods.forget(nameless)
        rows = json.loads(scene.machine.run("shunt", "socket", "list", "names", "-o", "json"))
        assert {row["local_port"] for row in rows} == {int(port) for port in ports.values()}
        spaces = sorted(re.sub(r"\[\d+\]", "", row["netns"]) for row in rows)
        assert spaces == ["host", "net:", "pod1", "pod2"]
        scene.gone()
        scene.await_aborted(*where)
        scene.machine.until(lambda: scene.closing()["udp"] == before + 4, "has counted them")
        assert scene.closing()["left"] == 0
        scene.goes_on("direct", apart)
    record = scene.records(f"MESSAGE_ID={Event.SOCKETS_CLOSED}")[-1]
    assert "namespaces: 4" in record["MESSAGE"]


# The drop-in without one of the three; what is told then; and how many of two sockets stay.
LESS = {
    "CAP_SYS_ADMIN": ("CapabilityBoundingSet=~CAP_SYS_ADMIN", "CAP_SYS_ADMIN is missing", 2),
    "CAP_SYS_PTRACE": ("CapabilityBoundingSet=~CAP_SYS_PTRACE", "CAP_SYS_PTRACE is missing", 1),
    "setns": ("RestrictNamespaces=~net", "setns() is refused in spite of CAP_SYS_ADMIN", 2),
}


@pytest.mark.parametrize("without", LESS)
def test_it_needs_each_of_them(scene: Scene, without: str) -> None:
    line, why, stay = LESS[without]
    nameless = scene.pods.add()
    with scene.trial(line), scene.on_be2("pod1", nameless):
        scene.pods.forget(nameless)
        told = scene.closing()["barred"]
        assert why in told["why"]
        assert ";" not in told["why"], "of what is missing alone"
        assert (told["what"] == BARRED) == (stay == 2)
        scene.gone()
        scene.machine.until(lambda: scene.closing()["left"] == stay, "leaves some")
        scene.goes_on(nameless)
        if stay == 1:
            scene.await_aborted("pod1")


# Streams --------------------------------------------------------------------------------------


def test_redirected_streams_of_pods(scene: Scene) -> None:
    """The unit's sandbox has room for the programs and the maps of streams."""
    scene.pods.serve("pod2", "pod2")
    streamed = {"name": "streamed", "vip": STREAMED, "ports": [7], "backends": ["10.77.2.2"]}
    scene.serve({**streamed, "redirect": "on"})
    try:
        for where in ("", "pod1"):
            scene.pods.ask(program(where), where, "tcp", STREAMED, "7")
            scene.pods.until_more(program(where), 10)
            assert set(scene.pods.said(program(where))[1:]) == {"pod2"}
        rows = json.loads(scene.machine.run("shunt", "socket", "list", "streamed", "-o", "json"))
        ends = sorted((row["end"], row["netns"], row["stream"]) for row in rows)
        assert ends == [
            ("client", "host", "redirected"),
            ("client", "pod1", "redirected"),
            ("server", "pod2", "redirected"),
            ("server", "pod2", "redirected"),
        ]
        assert all(row["stream_messages"] > 5 for row in rows)
        streams = scene.status()["sockets"]["streams"]
        assert (streams["attached"], streams["events"]["PAIRED"]) == (True, 2)
        assert streams["bytes"] > 100
    finally:
        scene.pods.stop()


# The end --------------------------------------------------------------------------------------


def test_uninstalled_the_operators_copy_stays_until_purged(scene: Scene) -> None:
    scene.machine.run(str(ROOT / "tools/uninstall"))
    assert scene.machine.run("ls", INSTALLED, check=False).startswith("ls: cannot access")
    assert scene.machine.run("ls", DROP_INS).split() == ["namespaces.conf"]
    scene.machine.run(str(ROOT / "tools/install"))
    scene.machine.run("env", "PURGE=yes", str(ROOT / "tools/uninstall"))
    assert (
        scene.machine.shell(f"ls -d {DROP_INS} /usr/local/share/shunt", check=False).count(
            "cannot access"
        )
        == 2
    )
