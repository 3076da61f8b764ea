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

from shunt.kern import capabilities, cgroup, libbpf, netdev, sock_diag
from shunt.kern.bpffs import BPFFS, kind_of, mount_point
from shunt.kern.capabilities import CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON, CAP_SYS_ADMIN
from shunt.lb.errors import ShuntError

KERNEL_MIN = (6, 1)
MODULES = Path("/lib/modules")
VMLINUX = Path("/sys/kernel/btf/vmlinux")

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


def privileges(status: Path = capabilities.STATUS) -> Feature:
    held = capabilities.effective(status)
    # Before CAP_BPF there was CAP_SYS_ADMIN, which still includes it.
    if CAP_SYS_ADMIN in held:
        held |= {CAP_BPF, CAP_PERFMON}
    missing = [name for number, name in _CAPABILITIES.items() if number not in held]
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


def btf(path: Path = VMLINUX) -> Feature:
    present = path.is_file()
    return Feature(
        "btf",
        present,
        needed=True,
        why=f"{path} is there" if present else f"{path} does not exist",
        what="the kernel does not describe its types (BTF)",
        fix="boot a kernel with CONFIG_DEBUG_INFO_BTF (every Debian kernel has it)",
    )


def bpffs(path: Path = BPFFS, mountinfo: Path = Path("/proc/self/mountinfo")) -> Feature:
    kind = kind_of(path, mountinfo)
    return Feature(
        "bpffs",
        kind == "bpf",
        needed=False,  # ensure_bpffs mounts it
        why=f"{path} is on a file system of type {kind}",
        what=f"{path} is not on a BPF file system",
        fix=f"mount -t bpf bpf {mount_point(path)}",
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


def _module(name: str, modules: Path, release: str) -> tuple[bool, str]:
    """Whether the kernel has a module, or its code built in; and where that was seen."""
    release = release or platform.release()
    found = False
    for index in ("modules.dep", "modules.builtin"):
        path = modules / release / index
        if path.is_file():
            found |= re.search(rf"(^|/){name}\.ko", path.read_text(), re.MULTILINE) is not None
    return found, f"{modules / release} {'lists' if found else 'does not list'} {name}.ko"


def _by_module(name: str, module: str, what: str, fix: str, modules: Path, release: str) -> Feature:
    present, why = _module(module, modules, release)
    return Feature(name, present, needed=False, why=why, what=what, fix=fix)


def ipip(modules: Path = MODULES, release: str = "") -> Feature:
    """The kernel's own decapsulation, for backends; the module, or what is built in."""
    what = "this kernel cannot take IPIP apart by itself"
    fix = "on a backend: shunt decap --iface DEV"
    return _by_module("ipip", "ipip", what, fix, modules, release)


def vlan(modules: Path = MODULES, release: str = "") -> Feature:
    """VLAN devices: packets with tags are balanced without, but no backend is routed by one."""
    what = "this kernel has no VLAN devices: backends behind tags cannot be routed to"
    fix = "boot a kernel with CONFIG_VLAN_8021Q (every Debian kernel has it)"
    return _by_module("vlan", "8021q", what, fix, modules, release)


def bonding(modules: Path = MODULES, release: str = "") -> Feature:
    """Bond devices."""
    what = "this kernel has no bond devices"
    fix = "boot a kernel with CONFIG_BONDING (every Debian kernel has it)"
    return _by_module("bonding", "bonding", what, fix, modules, release)


def sctp(modules: Path = MODULES, release: str = "") -> Feature:
    """Sockets of SCTP, of which the balancer itself needs none."""
    what = "no process of this host can serve SCTP; it is balanced without"
    fix = "boot a kernel with CONFIG_IP_SCTP (every Debian kernel has it)"
    return _by_module("sctp", "sctp", what, fix, modules, release)


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


def xdp_tracepoints(path: Path = VMLINUX) -> Feature:
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


def cgroup2(mountinfo: Path = cgroup.MOUNTINFO) -> Feature:
    """Where sockets of this host are covered from."""
    try:
        found = cgroup.root(mountinfo)
    except ShuntError as error:
        return Feature("cgroup2", False, False, error.why, error.what, error.fix)
    return Feature("cgroup2", True, needed=False, why=f"cgroup v2 is mounted on {found}")


def _by_type(
    name: str, symbol: str, path: Path, what: str, fix: str, seen: tuple[str, str]
) -> Feature:
    """By a name among the kernel's types. `seen` says in words that it is there, or is not."""
    present = path.is_file() and b"\0%s\0" % symbol.encode() in path.read_bytes()
    return Feature(name, present, False, f"{path} {seen[0 if present else 1]} {symbol}", what, fix)


_LISTED = "lists", "does not list"
_STRUCT = "has struct", "has no struct"


def socket_hooks(path: Path = VMLINUX) -> Feature:
    """Whether the kernel asks programs about the addresses of sockets' calls."""
    return _by_type(
        *("socket_hooks", "__cgroup_bpf_run_filter_sock_addr", path),
        what="processes of this host cannot be given backends at connect()",
        fix="boot a kernel with CONFIG_CGROUP_BPF (every Debian kernel has it), or set"
        " `sockets: off`",
        seen=_LISTED,
    )


def mptcp(path: Path = VMLINUX) -> Feature:
    """Whether sockets of Multipath TCP are to be told from what they are made of."""
    return _by_type(
        *("mptcp", "mptcp_sock", path),
        what="no process of this host can use Multipath TCP",
        fix="nothing is lost by it here; kernels with CONFIG_MPTCP have it (every Debian kernel)",
        seen=_STRUCT,
    )


def sock_destroy(path: Path = VMLINUX) -> Feature:
    """Whether programs that go through sockets may close them."""
    return _by_type(
        *("sock_destroy", "bpf_sock_destroy", path),
        what="connections to backends that have gone are closed by socket diagnostics",
        fix="nothing is lost by it; Linux 6.5 and later have it",
        seen=_LISTED,
    )


def diag_destroy(works: Callable[[], str] = sock_diag.refusal) -> Feature:
    """Whether sockets can be closed by socket diagnostics, where programs cannot."""
    refusal = works()
    return Feature(
        "diag_destroy",
        not refusal,
        needed=False,
        why=refusal or "socket diagnostics closed a socket that was made for it",
        what="socket diagnostics cannot close connections to backends that have gone",
        fix="nothing, if there is sock_destroy; else boot a kernel with CONFIG_INET_DIAG_DESTROY"
        " (every Debian kernel has it), or set `sockets: {close: off}`",
    )


def socket_maps(path: Path = VMLINUX) -> Feature:
    """Whether sockets can be put into maps, and messages redirected from one to another."""
    return _by_type(
        *("socket_maps", "sk_psock", path),
        what="streams between sockets of this host cannot be redirected (`redirect: on`)",
        fix="boot a kernel with CONFIG_NET_SOCK_MSG (every Debian kernel has it)",
        seen=_STRUCT,
    )


def tcx(path: Path = VMLINUX) -> Feature:
    return _by_type(
        *("tcx", "tcx_link", path),
        what="TC programs are attached as filters of a clsact qdisc",
        fix="nothing is lost by it; Linux 6.6 and later have links for them",
        seen=_STRUCT,
    )


def hook_compiler(
    packages: Path = Path("/usr/lib/python3/dist-packages"),
    modules: Path = MODULES,
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
    cgroup2,
    socket_hooks,
    mptcp,
    sock_destroy,
    diag_destroy,
    socket_maps,
    tcx,
    ipip,
    vlan,
    bonding,
    sctp,
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
