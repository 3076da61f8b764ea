# SPDX-License-Identifier: Apache-2.0
"""A booted Debian machine in systemd-nspawn, on the network of one of the lab's hosts.

What is done in it is forgotten when it is powered off: its root is an overlay over a tree that
is made once and kept in the cache directory (tools/cache-dir; remove it to fetch a newer one).

BPF works in it since it has no user namespace, all capabilities, and bpf() among its system
calls. Its /sys/fs/bpf is a directory of this host's: systemd mounts none in a container.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from shunt.lab.netns import Process
from shunt.lab.topology import BPFFS, Host, Lab
from shunt.lb.errors import ShuntError
from tests.kernels import images

ROOT = images.ROOT
# No compiler, no pip, no kernel headers.
PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "iproute2", "procps", "python3", "libbpf1", "ethtool"),
    *("make", "libcap2-bin"),
)
JOURNAL = ("journalctl", "--no-pager", "--lines=20")


def tree() -> Path:
    """The root of a small Debian of this host's release."""
    release, main, _ = images.registry()
    home = images.cache().with_name("machines")
    home.mkdir(exist_ok=True)
    target = home / release
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            print(f"Making a machine's root file system: {release} ...", flush=True)
            making = home / f"making-{release}"
            shutil.rmtree(making, ignore_errors=True)
            include = f"--include={','.join(PACKAGES)}"
            images.run(
                ["debootstrap", "--variant=minbase", include, release, making, main],
                f"install {release}",
            )
            making.rename(target)
    return target


class Machine:
    """Boots on entering the context; powered off, with nothing left, on leaving."""

    def __init__(self, lab: Lab, host: Host) -> None:
        self.lab, self.host = lab, host
        self.name = f"{lab.name}-{host.role}"
        self.bpffs = BPFFS / self.name  # goes with the lab
        self.log = lab.directory / "machine.log"

    def __enter__(self) -> Self:
        self.bpffs.mkdir()
        self.process = Process(
            [
                *("systemd-nspawn", "--quiet", "--boot", f"--directory={tree()}"),
                *("--volatile=overlay", f"--machine={self.name}", "--console=pipe"),
                # Also where no systemd runs that would know of it.
                *("--register=no", "--keep-unit", "--link-journal=no"),
                f"--network-namespace-path={self.host.namespace.path}",
                *("--capability=all", "--system-call-filter=bpf"),
                f"--bind={self.bpffs}:{BPFFS}",
                f"--bind-ro={ROOT}",
            ],
            self.log,
        )
        try:
            self.until(lambda: self._leader() != 0, "is there")
            self.leader = self._leader()
            self.until(
                lambda: (
                    self.run("systemctl", "is-system-running", check=False).strip() == "running"
                ),
                "has booted",
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # SIGTERM makes systemd-nspawn power the machine off.
        self.process.stop(30)

    def _leader(self) -> int:
        """The machine's first process."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = children.read_text().split() if children.exists() else []
        return int(found[-1]) if found else 0

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
        """Raises: ShuntError with the end of the machine's log."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if not self.process.running or time.monotonic() > deadline:
                raise ShuntError(
                    f"the machine {what}: not so after {timeout_s:g} s",
                    why=self.process.log_tail() or "it says nothing",
                    fix=f"see {self.log}",
                )
            time.sleep(0.1)

    def run(self, *argv: str, check: bool = True, timeout_s: float = 120) -> str:
        """What a program prints in the machine, on both streams.

        Raises: ShuntError with that, if it failed and `check` is true.
        """
        enter = ["nsenter", f"--target={self.leader}"]
        enter += ["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd"]
        environment = ["env", "-i", "LANG=C.UTF-8", "HOME=/root", "SYSTEMD_COLORS=0"]
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        done = subprocess.run(
            [*enter, *environment, path, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
            start_new_session=True,
        )
        if check and done.returncode:
            raise ShuntError(
                f"in the machine `{' '.join(argv)}` failed with exit code {done.returncode}",
                why=done.stdout[-3000:],
                fix=f"the journal's end:\n{self.run(*JOURNAL, check=False)}",
            )
        return done.stdout

    def write(self, path: str, text: str) -> None:
        """A file of the machine, in one step."""
        place = "/proc", str(self.leader), "root"
        target = Path(*place, path.lstrip("/"))
        draft = target.with_name(f".{target.name}.draft")
        draft.write_text(text)
        draft.chmod(0o644)
        draft.replace(target)

    def shell(self, script: str, *, check: bool = True) -> str:
        return self.run("bash", "-c", script, check=check)
