# SPDX-License-Identifier: Apache-2.0
"""Named probes for what Shunt wants of a host; `shunt doctor` shows each, tests skip by them.

A probe looks and changes nothing. Those that read a file take its path, so that a test can show
them a host that lacks it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shunt.kern import libbpf, netdev
from shunt.lb.errors import ShuntError

KERNEL_MIN = (6, 1)
BPFFS = Path("/sys/fs/bpf")

# linux/capability.h
CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF = 12, 21, 38, 39
_CAPABILITIES = {
    CAP_NET_ADMIN: "CAP_NET_ADMIN",
    CAP_PERFMON: "CAP_PERFMON",
    CAP_BPF: "CAP_BPF",
}


@dataclass(frozen=True, slots=True)
class Feature:
    """What a probe found. `what` and `fix` are of its absence."""

    name: str
    present: bool
    needed: bool
    why: str  # what was seen
    what: str = ""
    fix: str = ""

    def error(self) -> ShuntError:
        return ShuntError(self.what, self.why, self.fix)


def kernel(release: str = "") -> Feature:
    release = release or platform.release()
    found = re.match(r"(\d+)\.(\d+)", release)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    least = ".".join(map(str, KERNEL_MIN))
    return Feature(
        "kernel",
        version >= KERNEL_MIN,
        needed=True,
        why=f"this is Linux {release}; Shunt is tested from {least} on",
        what=f"the kernel {release} is too old",
        fix=f"boot Linux {least} or later (Debian 12's kernel is 6.1)",
    )


def privileges(status: Path = Path("/proc/self/status")) -> Feature:
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status.read_text(), re.MULTILINE)
    held = int(found[1], 16) if found else 0
    # Before CAP_BPF there was CAP_SYS_ADMIN, which still includes it.
    if held >> CAP_SYS_ADMIN & 1:
        held |= 1 << CAP_BPF | 1 << CAP_PERFMON
    missing = [name for bit, name in _CAPABILITIES.items() if not held >> bit & 1]
    return Feature(
        "privileges",
        not missing,
        needed=True,
        why=f"this process lacks {', '.join(missing)}" if missing else "all capabilities are there",
        what="Shunt is not allowed to load BPF programs and to change the network",
        fix="run it as root (sudo), or with CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN",
    )


def bpf_syscall() -> Feature:
    """Asks for a link of no program: a kernel that knows links looks for the program first."""
    code = 0
    try:
        opts = libbpf.LinkCreateOpts(sz=ctypes.sizeof(libbpf.LinkCreateOpts))
        libbpf.call("bpf_link_create", -1, 1, libbpf.BPF_XDP, ctypes.byref(opts))
    except OSError as error:
        code = error.errno or 0
    except ShuntError as error:  # no libbpf, or an old one
        return Feature("bpf_syscall", False, True, error.why, error.what, error.fix)
    present = code == errno.EBADF
    fix = "boot a kernel with CONFIG_BPF_SYSCALL (every Debian kernel has it)"
    if code == errno.EPERM:
        fix = privileges().fix
    return Feature(
        "bpf_syscall",
        present,
        needed=True,
        why="bpf() knows links" if present else f"bpf(): {os.strerror(code)}",
        what="the kernel does not let Shunt use BPF links",
        fix=fix,
    )


def btf(path: Path = Path("/sys/kernel/btf/vmlinux")) -> Feature:
    present = path.is_file()
    return Feature(
        "btf",
        present,
        needed=True,
        why=f"{path} is there" if present else f"{path} does not exist",
        what="the kernel does not describe its types (BTF)",
        fix="boot a kernel with CONFIG_DEBUG_INFO_BTF (every Debian kernel has it)",
    )


def filesystem_of(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> str:
    """The type of the file system that holds `path`, which need not exist."""
    path = path.absolute()
    best, kind = -1, ""
    for line in mountinfo.read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        # Spaces stand as \040 there.
        point = Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields.split()[4]))
        # Later mounts lie on top of earlier ones.
        if (path == point or point in path.parents) and len(point.parts) >= best:
            best, kind = len(point.parts), rest.split()[0]
    return kind


def bpffs(path: Path = BPFFS, mountinfo: Path = Path("/proc/self/mountinfo")) -> Feature:
    kind = filesystem_of(path, mountinfo)
    return Feature(
        "bpffs",
        kind == "bpf",
        needed=False,  # ensure_bpffs mounts it
        why=f"{path} is on a file system of type {kind}",
        what=f"{path} is not on a BPF file system",
        fix=f"mount -t bpf bpf {_mount_point(path)}",
    )


def jit(path: Path = Path("/proc/sys/net/core/bpf_jit_enable")) -> Feature:
    # The file exists only in the first network namespace, and the setting is the whole kernel's.
    text = path.read_text().strip() if path.exists() else ""
    return Feature(
        "jit",
        text != "0",
        needed=False,
        why=f"{path} is {text}" if text else f"{path} cannot be seen from here; on by default",
        what="BPF programs are interpreted, several times as slow as compiled",
        fix="sysctl -w net.core.bpf_jit_enable=1",
    )


def ipip(modules: Path = Path("/lib/modules"), release: str = "") -> Feature:
    """The kernel's own decapsulation, for backends; the module, or what is built in."""
    release = release or platform.release()
    found = False
    for name in ("modules.dep", "modules.builtin"):
        index = modules / release / name
        if index.is_file():
            found |= re.search(r"(^|/)ipip\.ko", index.read_text(), re.MULTILINE) is not None
    return Feature(
        "ipip",
        found,
        needed=False,
        why=f"{modules / release} {'lists' if found else 'does not list'} ipip.ko",
        what="this kernel cannot take IPIP apart by itself",
        fix="on a backend: shunt decap --iface DEV",
    )


def xdp_features() -> Feature:
    present = netdev.xdp_acts(1) is not None
    return Feature(
        "xdp_features",
        present,
        needed=False,
        why=f"the kernel {'tells' if present else 'does not tell'} what native XDP a driver has",
        what="whether a driver has native XDP is known only once a program is attached",
        fix="look at `shunt status`, or boot Linux 6.3 or later",
    )


_TRACEPOINTS = ("xdp_exception", "xdp_bulk_tx", "xdp_redirect_err", "xdp_devmap_xmit")


def xdp_tracepoints(path: Path = Path("/sys/kernel/btf/vmlinux")) -> Feature:
    """Whether the kernel tells, typed, what became of frames that XDP sent."""
    types = path.read_bytes() if path.is_file() else b""
    missing = [n for n in _TRACEPOINTS if b"\0btf_trace_%s\0" % n.encode() not in types]
    return Feature(
        "xdp_tracepoints",
        not missing,
        needed=False,
        why=f"{path} has no {', '.join(missing)}" if missing else f"{path} lists all of them",
        what="frames that drivers lose after XDP has sent them are not counted",
        fix="boot a kernel with CONFIG_TRACEPOINTS (every Debian kernel has it); meanwhile see"
        " the drivers' own counters: ethtool -S DEV",
    )


def hook_compiler(
    packages: Path = Path("/usr/lib/python3/dist-packages"),
    modules: Path = Path("/lib/modules"),
    archive: Path = Path("/sys/kernel/kheaders.tar.xz"),
    release: str = "",
) -> Feature:
    """What `shunt hook load FILE.c` wants: bcc for the system's Python, and kernel headers."""
    release = release or platform.release()
    named = os.environ.get("BCC_KERNEL_SOURCE")  # bcc's own: headers somewhere else
    headers = Path(named) if named else modules / release / "build"
    missing = {}
    if not (packages / "bcc").is_dir():
        missing["python3-bpfcc"] = f"{packages / 'bcc'} does not exist"
    if not headers.is_dir() and not archive.exists():
        missing[f"linux-headers-{release}"] = f"{headers} does not exist"
    return Feature(
        "hook_compiler",
        not missing,
        needed=False,
        why="; ".join(missing.values()) or f"bcc is there, and {headers}",
        what="hooks can be loaded from object files only, not compiled here",
        fix=f"apt-get install {' '.join(missing)}" if missing else "",
    )


PROBES: tuple[Callable[[], Feature], ...] = (
    kernel,
    privileges,
    bpf_syscall,
    btf,
    bpffs,
    jit,
    xdp_features,
    xdp_tracepoints,
    ipip,
    hook_compiler,
)


def probe_all() -> list[Feature]:
    """Every feature, in the order in which their absence matters."""
    return [probe() for probe in PROBES]


def check_host() -> None:
    """Raises: ShuntError for the first needed feature that is missing."""
    for probe in PROBES:
        feature = probe()
        if feature.needed and not feature.present:
            raise feature.error()


def ensure_bpffs(path: Path) -> bool:
    """Make the directory `path` on a BPF file system, mounting one if there is none.

    True if it was mounted. Raises: ShuntError; nothing is mounted then.
    """
    mounted = False
    if filesystem_of(path) != "bpf":
        point = _mount_point(path)
        try:
            point.mkdir(parents=True, exist_ok=True)
            _mount(point)
        except OSError as error:
            raise ShuntError(
                f"no BPF file system at {point}, and none can be mounted",
                why=f"{error.strerror}: pins need one",
                fix=f"mount -t bpf bpf {point} (as root; systemd does it at boot)",
            ) from error
        mounted = True
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ShuntError(
            f"cannot make the directory {path} for pins",
            why=str(error.strerror),
            fix="run as root; a BPF file system takes no name with a dot",
        ) from error
    return mounted


def _mount_point(path: Path) -> Path:
    return BPFFS if path == BPFFS or BPFFS in path.parents else path


def _mount(point: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    ms_nosuid_nodev_noexec = 2 | 4 | 8
    if libc.mount(b"bpf", os.fsencode(point), b"bpf", ms_nosuid_nodev_noexec, b"mode=0700") != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
