# SPDX-License-Identifier: Apache-2.0
"""What a network device's driver does: its name, its offloads, what XDP it has."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyroute2.ethtool.ioctl import IoctlEthtool  # type: ignore[import-untyped]

from shunt.kern.netlink import Link, Netlink

SIOCETHTOOL, ETHTOOL_GDRVINFO = 0x8946, 0x3
CLONE_NEWNET = 0x40000000
NETNS_DIR = Path("/run/netns")

# linux/netdev.h, enum netdev_xdp_act (Linux 6.3)
XDP_ACT_BASIC, XDP_ACT_REDIRECT, XDP_ACT_NDO_XMIT = 1, 2, 4
# linux/netlink.h, linux/genetlink.h
_NETLINK_GENERIC = 16
_GENL_ID_CTRL, _CTRL_CMD_GETFAMILY, _CTRL_ATTR_FAMILY_ID, _CTRL_ATTR_FAMILY_NAME = 0x10, 3, 1, 2
_NETDEV_CMD_DEV_GET, _NETDEV_A_DEV_IFINDEX, _NETDEV_A_DEV_XDP_FEATURES = 1, 1, 3
_NLMSG_ERROR = 2

# ethtool's words for features of the kernel's.
_SHORT = {
    "tx-checksum-ip-generic": "tx",
    "tx-checksum-ipv4": "tx",
    "tx-checksum-ipv6": "tx",
    "rx-checksum": "rx",
    "tx-tcp-segmentation": "tso",
    "tx-generic-segmentation": "gso",
    "rx-gro": "gro",
    "rx-gro-hw": "rx-gro-hw",
    "rx-lro": "lro",
    "rx-vlan-hw-parse": "rxvlan",
    "tx-vlan-hw-insert": "txvlan",
}


@dataclass(frozen=True, slots=True)
class Device:
    """A link with what its driver says. `offloads` are those that are on, in ethtool's words."""

    link: Link
    driver: str
    offloads: frozenset[str]
    xdp: int | None  # XDP_ACT_*; None: the kernel does not tell (before 6.3)
    namespace: str = ""  # its name under /run/netns; empty: ours


def device(link: Link, namespace: str = "") -> Device:
    """Raises: OSError if the device has gone."""
    return Device(link, driver(link.name), offloads(link.name), xdp_acts(link.ifindex), namespace)


def driver(name: str) -> str:
    """The driver's name; empty for a device without one (lo)."""
    info = ctypes.create_string_buffer(struct.pack("=I", ETHTOOL_GDRVINFO), 196)
    request = struct.pack("16sP16x", name.encode(), ctypes.addressof(info))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        try:
            fcntl.ioctl(control, SIOCETHTOOL, request)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return ""
            raise
    return info.raw[4:36].split(b"\0")[0].decode()


def offloads(name: str) -> frozenset[str]:
    """Which of the offloads that matter here are on, in ethtool's words: the values of _SHORT."""
    ethtool = IoctlEthtool(name)
    try:
        features = ethtool.get_features()
        # Which names there are depends on the kernel.
        active = {name for name in features.keys() if features.is_active(name)}  # noqa: SIM118
        return frozenset(short for long, short in _SHORT.items() if long in active)
    finally:
        ethtool.close()


def xdp_acts(ifindex: int) -> int | None:
    """What native XDP a driver has, as XDP_ACT_* bits; None if the kernel cannot tell."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC) as control:
        control.bind((0, 0))
        name = _attribute(_CTRL_ATTR_FAMILY_NAME, b"netdev\0")
        family = _ask(control, _GENL_ID_CTRL, _CTRL_CMD_GETFAMILY, name)
        if family is None:
            return None
        number = struct.unpack("=H", family[_CTRL_ATTR_FAMILY_ID][:2])[0]
        index = _attribute(_NETDEV_A_DEV_IFINDEX, struct.pack("=I", ifindex))
        found = _ask(control, number, _NETDEV_CMD_DEV_GET, index)
        if found is None or _NETDEV_A_DEV_XDP_FEATURES not in found:
            return None
        return int.from_bytes(found[_NETDEV_A_DEV_XDP_FEATURES][:8], "little")


def veth_peer(link: Link, directory: Path = NETNS_DIR) -> Device | None:
    """The other end of a veth, here or in a named namespace; None if it is somewhere else."""
    if link.lower_nsid is None:
        with Netlink() as netlink:
            other = netlink.links().get(link.lower)
        return device(other) if other is not None else None
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for path in sorted(directory.iterdir()) if directory.is_dir() else []:
            with contextlib.suppress(OSError), _inside(path), Netlink() as netlink:
                other = netlink.links().get(link.lower)
                # Indexes repeat from namespace to namespace: it must point back here.
                if (
                    other is not None
                    and (other.kind, other.lower) == ("veth", link.ifindex)
                    and other.lower_nsid == netlink.nsid(here)
                ):
                    return device(other, path.name)
    finally:
        os.close(here)
    return None


@contextlib.contextmanager
def _inside(path: Path) -> Iterator[None]:
    """This thread alone is in another network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    back = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if libc.setns(there, CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"setns {path}")
        finally:
            os.close(there)
        try:
            yield
        finally:
            libc.setns(back, CLONE_NEWNET)
    finally:
        os.close(back)


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _ask(control: socket.socket, family: int, command: int, body: bytes) -> dict[int, bytes] | None:
    """One generic netlink request; the answer's attributes, or None for an error."""
    payload = struct.pack("=BBH", command, 1, 0) + body
    control.send(struct.pack("=IHHII", 16 + len(payload), family, 1, 1, 0) + payload)
    answer = control.recv(1 << 16)
    length, kind = struct.unpack_from("=IH", answer)
    if kind == _NLMSG_ERROR:
        return None
    found: dict[int, bytes] = {}
    offset = 20
    while offset + 4 <= length:
        size, attribute = struct.unpack_from("=HH", answer, offset)
        found[attribute & 0x3FFF] = answer[offset + 4 : offset + size]
        offset += (size + 3) & ~3
    return found
