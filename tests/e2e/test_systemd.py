# SPDX-License-Identifier: Apache-2.0
"""Shunt installed on a machine that systemd runs, with traffic through it: `make test-systemd`.

```
    client ---- router ---- switch ---- lb1     a booted Debian in systemd-nspawn: make install
                                 '----- be1, be2     HTTP and echo servers
```

lab/topology.py draws it in full. The tests build on one another, in the order of this file; what
passes the machine meanwhile must not suffer from any of it.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from shunt.agent.events import Event
from shunt.lab.reports import Plan, Target
from shunt.lab.scenario import SERVICES
from shunt.lab.servers import Servers
from shunt.lab.shuntd import SETTINGS
from shunt.lab.traffic import Traffic
from tests.e2e.installed import Installed
from tests.e2e.machine import ROOT, Machine
from tests.e2e.programs import Programs, checking
from tests.scenes import lab_with_servers, nothing_lost

# The first of all makes a machine's root file system.
pytestmark = pytest.mark.timeout(1200)

LOADING = {"cap_bpf", "cap_net_admin", "cap_perfmon"}
RUNNING = {"cap_setuid", "cap_setgid", "cap_kill"}  # health checks of type exec
CAPABILITIES = LOADING | RUNNING
# `systemd-analyze security`: 0 is a locked cell, 10 anything goes. What is left is what a load
# balancer is for: the network, and BPF.
EXPOSURE_MAX = 2.4
# Written by the machine itself all the time, or by who comes in.
RESTLESS = ("/proc", "/sys", "/dev", "/run", "/tmp", "/var/tmp", "/var/log", "/var/lib/systemd")
LISTING = (
    "find / "
    + " -o ".join(f"-path {place} -prune" for place in (*RESTLESS, str(ROOT), "/var/cache"))
    + " -o -printf '%p %y %m %u:%g %l\\n' | sort"
)


@dataclass
class Scene(Installed):
    servers: dict[str, Servers]
    traffic: Traffic
    before: str = ""

    def nothing_lost(self) -> AbstractContextManager[object]:
        return nothing_lost(self.traffic)

    def troubles(self) -> Any:
        """Of checks."""
        return self.status(check=False)["checks"]["troubles"]


def plan() -> Plan:
    return Plan(
        targets=tuple(
            Target(
                name=s.name,
                address=str(s.vip),
                http_rate=4,
                udp_rate=4,
                tcp_flows=10,
                udp_flows=2,
                message_interval_s=0.5,
            )
            for s in SERVICES
        ),
        request_timeout_s=10.0,
        stall_timeout_s=10.0,
    )


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        lab, servers = stack.enter_context(lab_with_servers(balancer_count=1, backend_count=2))
        machine = stack.enter_context(Machine(lab, lab.balancers[0]))
        before = machine.shell(LISTING)
        Installed(machine).install(SETTINGS, [s.document(lab.backends) for s in SERVICES])
        machine.until(lambda: _all_up(machine), "finds every backend up")
        traffic = stack.enter_context(Traffic(lab.client, plan(), lab.directory))
        traffic.wait_established(60)
        yield Scene(machine, servers, traffic, before)


def _all_up(machine: Machine) -> bool:
    shown = json.loads(machine.run("shunt", "backend", "list", "-o", "json"))
    return all(b["state"] == "up" and b["health"]["checks"] for b in shown)


def test_it_forwards_and_systemd_knows_it(scene: Scene) -> None:
    assert {i["mode"] for i in scene.status()["interfaces"]} == {"native"}
    shown = scene.machine.run("systemctl", "status", "--no-pager", "shuntd")
    assert 'Status: "generation 1 in force"' in shown
    (started,) = scene.records(f"MESSAGE_ID={Event.STARTED}")
    assert (started["SHUNT_GENERATION"], started["PRIORITY"]) == ("1", "6")
    # There is neither compiler nor checkout behind it.
    assert scene.machine.run("which", "clang", "gcc", "cc", "pip", check=False) == ""
    objects = scene.machine.shell("ls /usr/local/lib/shunt/shunt/xdp/*.bpf.o").split()
    built = (source.with_suffix(".o").name for source in (ROOT / "xdp").glob("*.bpf.c"))
    assert [Path(path).name for path in objects] == sorted(built)
    assert [
        r["MESSAGE"] for r in scene.records("PRIORITY=6") if "not counted" in r["MESSAGE"]
    ] == []


def test_the_daemon_has_what_is_declared_and_no_more(scene: Scene) -> None:
    status = scene.machine.run("cat", f"/proc/{scene.pid()}/status")
    held = dict(re.findall(r"^(Cap\w+|NoNewPrivs|Seccomp|Uid|Gid):\s*(.*)$", status, re.MULTILINE))
    for kind in ("CapPrm", "CapEff", "CapBnd"):
        names = scene.machine.run("capsh", f"--decode={held[kind]}").partition("=")[2]
        assert set(names.strip().split(",")) == CAPABILITIES, kind
    assert (held["CapInh"], held["CapAmb"]) == ("0" * 16, "0" * 16)
    assert (held["NoNewPrivs"], held["Seccomp"]) == ("1", "2")
    shown = scene.machine.run("systemd-analyze", "security", "--no-pager", "shuntd")
    (exposure,) = re.findall(r"Overall exposure level for shuntd.service: ([\d.]+)", shown)
    assert float(exposure) <= EXPOSURE_MAX


@pytest.mark.parametrize("name", sorted(LOADING))
def test_it_needs_each_of_them(scene: Scene, name: str) -> None:
    """Without the look at its own capabilities, which refuses at once: the kernel refuses too."""
    others = " ".join(sorted(LOADING - {name})).upper()
    code = (
        "import sys; sys.path.insert(0, '/usr/local/lib/shunt')\n"
        "from pathlib import Path\n"
        "from shunt.lb.model import Settings\n"
        "from shunt.xdp.attach import Datapath\n"
        "data = Datapath(Path('/sys/fs/bpf/trial'))\n"
        "data.load(Settings(interfaces=('lo',)))\n"
        "data.attach(['lo'], 'generic')\n"
    )
    run = ["systemd-run", "--quiet", "--pipe", "--wait", "-p", "LimitMEMLOCK=infinity"]
    clean = "find /sys/fs/bpf/trial -depth -delete"

    def attempt(capabilities: str) -> str:
        try:
            return scene.machine.run(
                *(*run, "-p", f"CapabilityBoundingSet={capabilities}", "python3", "-c", code),
                check=False,
            )
        finally:
            scene.machine.shell(clean)

    assert attempt(" ".join(LOADING).upper()) == ""
    assert "shunt.lb.errors.ShuntError" in attempt(others)


@pytest.fixture
def programs(scene: Scene) -> Iterator[Programs]:
    with checking(scene.machine) as programs:
        yield programs


def test_programs_check_unprivileged_and_are_ended(scene: Scene, programs: Programs) -> None:
    scene.machine.until(lambda: bool(programs.row("ends")["last_ok"]), "runs the program")
    scene.machine.until(lambda: programs.row("hangs")["state"] == "failing", "ends the other")
    assert programs.row("hangs")["reason"] == "/bin/sleep: no end within 1.5 s"
    assert scene.troubles() == {}
    # Those under way, and no more.
    assert len(programs.sleepers("1234")) <= 1
    assert len(programs.sleepers("4321")) <= 1


def test_a_check_by_way_of_a_vip(scene: Scene) -> None:
    """The unit's sandbox has room for its mark, its rule and its program."""
    path = "/etc/shunt/services.d/via.yaml"
    check = {"port": 80, "via": "vip"}
    via = {"name": "via", "vip": "203.0.113.10", "ports": [81], "backends": ["10.0.0.101"]}
    scene.machine.write(path, yaml.safe_dump({**via, "health": check}))
    scene.machine.run("systemctl", "reload", "shuntd")
    ask = ["shunt", "health", "list", "via", "-o", "json"]
    scene.machine.until(
        lambda: bool(json.loads(scene.machine.run(*ask))["health"][0]["last_ok"]), "is answered"
    )
    scene.machine.run("rm", path)
    scene.machine.run("systemctl", "reload", "shuntd")
    assert "5348" not in scene.machine.run("ip", "rule")


@pytest.mark.parametrize("name", sorted(RUNNING))
def test_programs_need_each_of_theirs(scene: Scene, programs: Programs, name: str) -> None:
    with programs.bounded(CAPABILITIES - {name}):
        scene.machine.until(lambda: sum(scene.troubles().values()) > 2, "is refused something")
        assert not programs.row("ends")["last_ok"]


def test_only_root_and_the_group_may_ask(scene: Scene) -> None:
    socket = scene.machine.run("stat", "-c", "%A %U:%G", "/run/shunt/shunt.sock").strip()
    assert socket == "srw-rw---- root:shunt"
    ask = ["python3", "-I", "/usr/local/bin/shunt", "service", "list", "-o", "json"]
    member = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
    said = scene.machine.run(*member, *ask, check=False)
    assert "this user may not use the socket" in said
    member[-1] = "--groups=shunt"
    assert len(json.loads(scene.machine.run(*member, *ask))) == len(SERVICES)


def test_a_restart(scene: Scene) -> None:
    before = scene.pid()
    with scene.nothing_lost():
        scene.machine.run("systemctl", "restart", "shuntd")
        assert scene.restarted(before)
    assert scene.records(f"MESSAGE_ID={Event.STOPPED}")


def test_a_program_swap(scene: Scene) -> None:
    before = scene.status()["interfaces"]
    with scene.nothing_lost():
        scene.machine.run("shunt", "program", "swap")
    assert scene.status()["interfaces"] != before


def test_kill_9_and_systemd_brings_it_back(scene: Scene) -> None:
    before = scene.pid()
    assert before > 0
    with scene.nothing_lost():
        scene.machine.run("kill", "-9", str(before))
        scene.machine.until(lambda: scene.restarted(before), "has a new shuntd")
    assert scene.machine.run("systemctl", "show", "-P", "NRestarts", "shuntd").strip() == "1"


def test_a_daemon_that_hangs_is_replaced(scene: Scene) -> None:
    """A limit of some seconds here instead of half a minute."""
    scene.machine.shell(
        "mkdir -p /run/systemd/system/shuntd.service.d && printf '[Service]\\nWatchdogSec=5s\\n'"
        " >/run/systemd/system/shuntd.service.d/watchdog.conf && systemctl daemon-reload"
    )
    scene.machine.run("systemctl", "restart", "shuntd")
    before = scene.pid()
    assert before > 0
    with scene.nothing_lost():
        scene.machine.run("kill", "-STOP", str(before))
        scene.machine.until(lambda: scene.restarted(before), "has a new shuntd")
    said = scene.machine.run("journalctl", "-u", "shuntd", "--no-pager")
    assert "Watchdog timeout" in said
    scene.machine.shell("rm -r /run/systemd/system/shuntd.service.d && systemctl daemon-reload")
    scene.machine.run("systemctl", "restart", "shuntd")


def test_a_reload_is_in_force_or_refused_when_it_returns(scene: Scene) -> None:
    path = "/etc/shunt/services.d/more.yaml"
    more = {"name": "more", "vip": "203.0.113.99", "ports": [80], "backends": []}
    pid, before = scene.pid(), scene.status()["generation"]
    with scene.nothing_lost():
        scene.machine.write(path, yaml.safe_dump(more))
        scene.machine.run("systemctl", "reload", "shuntd")
        assert scene.status()["generation"] > before
        scene.machine.write(path, yaml.safe_dump({**more, "ports": [99999]}))
        said = scene.machine.run("systemctl", "reload", "shuntd", check=False)
        assert "failed" in said
        assert "1 error" in scene.machine.run("systemctl", "show", "-P", "StatusText", "shuntd")
        (refused, *_) = scene.records(f"MESSAGE_ID={Event.REFUSED}")
        assert refused["PRIORITY"] == "3"
        scene.machine.run("rm", path)
        scene.machine.run("systemctl", "reload", "shuntd")
    assert scene.pid() == pid


def test_what_befalls_a_backend_stands_in_fields(scene: Scene) -> None:
    """Last of those with traffic: connections to be2 end with it."""
    scene.servers["be2"].kill()
    down = f"MESSAGE_ID={Event.BACKEND_DOWN}", "SHUNT_SERVICE=l2-v4"
    scene.machine.until(lambda: bool(scene.records(*down)), "has logged it")
    (record,) = scene.records(*down)
    assert (record["SHUNT_BACKEND"], record["PRIORITY"]) == ("10.0.0.102", "4")
    assert record["MESSAGE"].startswith("backend 10.0.0.102 of service l2-v4 is down")
    assert record["SYSLOG_IDENTIFIER"] == "shuntd"


def test_installing_again_changes_nothing(scene: Scene) -> None:
    places = "find /usr/local /etc/shunt -printf '%p %m %u:%g %l\\n' | sort; cat /etc/shunt/*.yaml"
    before = scene.machine.shell(places)
    assert "left as it is" in scene.machine.run(str(ROOT / "tools/install"))
    assert scene.machine.shell(places) == before


def test_decap_on_a_backend(scene: Scene) -> None:
    scene.machine.run("ip", "link", "add", "be0", "type", "veth", "peer", "name", "be1")
    scene.machine.shell("ip link set be0 up; ip link set be1 up")
    scene.machine.run("systemctl", "start", "shunt-decap@be0")
    assert [d["interface"] for d in json.loads(scene.machine.run("shunt", "-o", "json", "decap"))]
    scene.machine.run("systemctl", "stop", "shunt-decap@be0")
    assert json.loads(scene.machine.run("shunt", "-o", "json", "decap")) == []
    scene.machine.run("ip", "link", "del", "be0")


def test_uninstalled_it_goes_on_forwarding(scene: Scene) -> None:
    said = scene.machine.run(str(ROOT / "tools/uninstall"))
    assert "/etc/shunt" in said
    assert scene.machine.run("which", "shunt", "shuntd", check=False) == ""
    assert scene.machine.run("cat", "/etc/shunt/shunt.yaml") == yaml.safe_dump(dict(SETTINGS))
    scene.traffic.wait_answered()
    assert "xdp" in scene.machine.run("ip", "link", "show", "dev", "eth0")


def test_purged_it_leaves_the_machine_as_it_was(scene: Scene) -> None:
    scene.machine.run(str(ROOT / "tools/install"))
    scene.machine.run("env", "PURGE=yes", str(ROOT / "tools/uninstall"))
    after = scene.machine.shell(LISTING)
    assert set(after.splitlines()) ^ set(scene.before.splitlines()) == set()
    assert "xdp" not in scene.machine.run("ip", "link", "show", "dev", "eth0")
    assert scene.machine.run("find", "/sys/fs/bpf", "/run/shunt", check=False).splitlines()[:1] == [
        "/sys/fs/bpf"
    ]
    assert scene.machine.run("getent", "group", "shunt", check=False) == ""


def test_below_a_directory_of_a_package(tmp_path: Path) -> None:
    """What a package is made of: no path of the build in it, and nothing done to this host."""
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DESTDIR": str(tmp_path)}
    subprocess.run(
        [ROOT / "tools/install"], env={**environment, "PREFIX": "/usr"}, check=True, timeout=120
    )
    unit = (tmp_path / "usr/lib/systemd/system/shuntd.service").read_text()
    assert "ExecStart=/usr/sbin/shuntd\n" in unit
    assert (tmp_path / "usr/bin/shunt").read_text().count("/usr/lib/shunt") == 1
    own = [p for p in tmp_path.rglob("*") if p.is_file() and "lib/shunt/" not in str(p)]
    assert [p for p in own if str(tmp_path) in p.read_text() or str(ROOT) in p.read_text()] == []
    subprocess.run([ROOT / "tools/uninstall"], env={**environment, "PREFIX": "/usr"}, check=True)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"etc/shunt/shunt.yaml", "etc/shunt/services.d/README"}
