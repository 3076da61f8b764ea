# SPDX-License-Identifier: Apache-2.0
"""Network namespaces, veth pairs, and processes that live in them.

Only the *network* namespace of a process is ever switched (`nsenter --net`). `ip netns exec`
would also unshare the mount namespace and put a fresh /sys over it, and with it hide bpffs and
everything pinned there.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from shunt.lb.errors import ShuntError
from shunt.lb.model import IPAddress

NETNS_DIR = Path("/run/netns")
CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class Process:
    """A program in a namespace, in a session of its own, with its output in a file.

    It dies with the thread that started it (PR_SET_PDEATHSIG), so that a lab that is killed with
    -9 leaves no servers behind; and Ctrl-C on the terminal reaches the lab alone, which then
    stops its programs in order.
    """

    def __init__(
        self,
        argv: Sequence[str],
        log: Path,
        *,
        namespace: Namespace | None = None,
        pipes: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.argv, self.log = list(argv), log
        enter = namespace.enter if namespace else []
        pipe = subprocess.PIPE if pipes else subprocess.DEVNULL
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *enter, *argv],
                stdin=pipe,
                stdout=subprocess.PIPE if pipes else out,
                stderr=out,
                start_new_session=True,
                env={**os.environ, **(env or {})},
            )

    @property
    def pid(self) -> int:
        # setpriv and nsenter exec what follows: the pid stays the same.
        return self.popen.pid

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def stop(self, timeout_s: float = 5.0) -> int:
        """SIGTERM; SIGKILL if that was not enough. The exit code (negative: the signal)."""
        if self.running:
            self.popen.terminate()
            try:
                self.popen.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.popen.kill()
        return self.popen.wait()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self.running:
            self.popen.send_signal(signal.SIGKILL)
        self.popen.wait()

    def log_tail(self, lines: int = 15) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return ""


@dataclass(frozen=True)
class Namespace:
    """A named network namespace under /run/netns."""

    name: str

    @classmethod
    def create(cls, name: str) -> Namespace:
        """Raises: ShuntError without privileges or if the name is taken; nothing is left."""
        _run(["ip", "netns", "add", name])
        namespace = cls(name)
        namespace.ip("link set dev lo up")
        return namespace

    @property
    def path(self) -> Path:
        return NETNS_DIR / self.name

    @property
    def enter(self) -> list[str]:
        return ["nsenter", f"--net={self.path}"]

    def ip(self, *commands: str) -> None:
        """Run `ip` commands (without the leading word) in one process; stop at the first error."""
        _run(["ip", "-n", self.name, "-batch", "-"], stdin="\n".join(commands) + "\n")

    def own(self, *addresses: str | IPAddress) -> None:
        """Give it addresses of its own, on lo. They can be used at once: even there one of IPv6 is
        tentative otherwise, until a worker of the kernel has run."""
        vips = [ip_address(address) for address in addresses]
        self.ip(*(
            f"addr add {vip}/{vip.max_prefixlen} dev lo" + " nodad" * (vip.version == 6)
            for vip in vips
        ))  # fmt: skip

    def bridge(self, *commands: str) -> None:
        """The same for `bridge`."""
        _run(["bridge", "-n", self.name, "-batch", "-"], stdin="\n".join(commands) + "\n")

    def mac(self, device: str) -> str:
        shown = json.loads(
            _run(["ip", "-n", self.name, "-j", "link", "show", "dev", device]).stdout
        )
        return str(shown[0]["address"])

    def run(
        self, *argv: str, check: bool = True, timeout_s: float = 30
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end here.

        Raises: ShuntError with what it printed, if it failed and `check` is true.
        """
        return _run([*self.enter, *argv], check=check, timeout_s=timeout_s)

    def start(self, argv: Sequence[str], log: Path, *, pipes: bool = False) -> Process:
        return Process(argv, log, namespace=self, pipes=pipes)

    def sysctl(self, settings: Mapping[str, int | str]) -> None:
        """Set kernel parameters below `net.` of this namespace: {"ipv4.ip_forward": 1}."""
        with self.inside():
            for key, value in settings.items():
                # A dot in an interface's name would need care; the lab's have none.
                Path("/proc/sys/net", key.replace(".", "/")).write_text(str(value))

    def retransmitted(self) -> int:
        """How many TCP segments were sent from here a second time, since it was made."""
        with self.inside():
            rows = Path("/proc/thread-self/net/snmp").read_text().splitlines()
        names, values = (row.split() for row in rows if row.startswith("Tcp:"))
        return int(values[names.index("RetransSegs")])

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """This thread's new sockets belong to the namespace; other threads are not touched."""
        back = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _setns(there)
            finally:
                os.close(there)
            try:
                yield
            finally:
                _setns(back)
        finally:
            os.close(back)

    def delete(self) -> None:
        """Its devices go when its last process has gone."""
        if self.path.exists():
            _run(["ip", "netns", "del", self.name])


def veth(a: Namespace, a_name: str, b: Namespace, b_name: str, mtu: int) -> None:
    """Connect two namespaces; both ends are up, without offloads (see `offloads`)."""
    a.ip(f"link add name {a_name} mtu {mtu} type veth peer name {b_name} mtu {mtu} netns {b.name}")
    for namespace, device in ((a, a_name), (b, b_name)):
        offloads(namespace, device)
        namespace.ip(f"link set dev {device} up")


def cable(a: Namespace, a_name: str, b: Namespace, b_name: str) -> None:
    """A veth pair with every offload that it has; both ends are up."""
    a.ip(f"link add name {a_name} type veth peer name {b_name} netns {b.name}")
    for namespace, device in ((a, a_name), (b, b_name)):
        namespace.ip(f"link set dev {device} up")


def offloads(namespace: Namespace, device: str) -> None:
    """Make a veth end behave like a wire.

    A veth hands its peer segments of up to 64 KiB with a checksum still to be filled in. A program
    that rewrites or encapsulates such a frame would send it on broken, so both are switched off on
    every end; and no received segments are merged into such ones.
    """
    features = [word for name in ("tx", "tso", "gso", "gro") for word in (name, "off")]
    namespace.run("ethtool", "-K", device, *features)


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "setns")


def _run(
    argv: Sequence[str], *, stdin: str = "", check: bool = True, timeout_s: float = 30
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        argv, input=stdin, text=True, capture_output=True, timeout=timeout_s, check=False
    )
    if check and done.returncode:
        raise ShuntError(
            f"`{' '.join(argv)}` failed with exit code {done.returncode}",
            why=" ".join((done.stderr or done.stdout).split())
            + (f" (input: {stdin})" * bool(stdin)),
            fix="the lab needs root, iproute2, ethtool and util-linux: run it with sudo",
        )
    return done
