# SPDX-License-Identifier: Apache-2.0
"""The kernel's neighbour table: who has which MAC, and entries that we ask it to keep current.

A *managed* entry (Linux 5.16) is resolved at once, again before it would go stale, and again for
as long as it fails, without a packet that needs it. Those that we ask for carry our protocol
number, so that they can be told from everybody else's, also by a process that comes later.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from pyroute2.netlink import rtnl  # type: ignore[import-untyped]
from pyroute2.netlink.rtnl.ndmsg import ndmsg  # type: ignore[import-untyped]

from shunt.kern.netlink import FAMILIES, NLM_F_CREATE, NLM_F_REPLACE, Netlink

IPAddress = IPv4Address | IPv6Address

# linux/neighbour.h
NUD_NONE, NUD_INCOMPLETE, NUD_REACHABLE, NUD_STALE, NUD_DELAY = 0x00, 0x01, 0x02, 0x04, 0x08
NUD_PROBE, NUD_FAILED, NUD_NOARP, NUD_PERMANENT = 0x10, 0x20, 0x40, 0x80
USABLE = NUD_REACHABLE | NUD_STALE | NUD_DELAY | NUD_PROBE | NUD_NOARP | NUD_PERMANENT
STATE_NAMES = {
    NUD_NONE: "none",
    NUD_INCOMPLETE: "incomplete",
    NUD_REACHABLE: "reachable",
    NUD_STALE: "stale",
    NUD_DELAY: "delay",
    NUD_PROBE: "probe",
    NUD_FAILED: "failed",
    NUD_NOARP: "noarp",
    NUD_PERMANENT: "permanent",
}
NTF_USE = 0x01
NTF_EXT_MANAGED = 0x01
# Ours among the protocols of rtnetlink.h, whose registered numbers all differ; 'S'.
PROTOCOL = 0x53


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An entry of the neighbour table."""

    ifindex: int
    address: IPAddress
    state: int  # NUD_*
    mac: bytes = b""
    managed: bool = False  # the kernel keeps it current
    ours: bool = False  # because we asked for it

    @property
    def kept(self) -> bool:
        """Whether the kernel looks after it by itself."""
        return self.managed or bool(self.state & (NUD_PERMANENT | NUD_NOARP))

    @property
    def usable_mac(self) -> bytes | None:
        """The MAC to send to, if there is one now."""
        return self.mac if self.state & USABLE and len(self.mac) == 6 else None

    @property
    def state_name(self) -> str:
        return STATE_NAMES.get(self.state, hex(self.state))


def find(netlink: Netlink, ifindex: int, address: IPAddress) -> Neighbour | None:
    """The entry of one neighbour, if the kernel has one."""
    try:
        answers = netlink.request(rtnl.RTM_GETNEIGH, _message(ifindex, address))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return None
        raise
    return to_neighbour(answers[0])


def all_of(netlink: Netlink) -> list[Neighbour]:
    """The whole table, both families."""
    found = (to_neighbour(answer) for answer in netlink.dump(rtnl.RTM_GETNEIGH, ndmsg()))
    return [neighbour for neighbour in found if neighbour is not None]


def keep(netlink: Netlink, ifindex: int, address: IPAddress) -> Neighbour | None:
    """Have the kernel resolve a neighbour and keep it current; what it knows now.

    What an operator made permanent, and what somebody else has the kernel manage, is left alone:
    the flag would take the permanence away.
    """
    known = find(netlink, ifindex, address)
    if known is not None and (known.managed or known.state & (NUD_PERMANENT | NUD_NOARP)):
        return known
    message = _message(ifindex, address)
    message["attrs"] += [("NDA_FLAGS_EXT", NTF_EXT_MANAGED), ("NDA_PROTOCOL", PROTOCOL)]
    netlink.request(rtnl.RTM_NEWNEIGH, message, NLM_F_CREATE | NLM_F_REPLACE)
    return find(netlink, ifindex, address)


def release(netlink: Netlink, ifindex: int, address: IPAddress) -> bool:
    """Undo `keep`: the entry stays and ages like any other. True if it was one of ours."""
    known = find(netlink, ifindex, address)
    if known is None or not (known.ours and known.managed):
        return False
    message = _message(ifindex, address)
    # With NTF_USE alone the kernel drops the flag and keeps state and MAC; a state given here
    # would replace what it has learnt.
    message["flags"] = NTF_USE
    try:
        netlink.request(rtnl.RTM_NEWNEIGH, message, NLM_F_REPLACE)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise
        return False
    return True


def release_all(netlink: Netlink) -> int:
    """Release every entry that we, or a process before us, had the kernel keep; how many."""
    kept = [n for n in all_of(netlink) if n.ours and n.managed]
    return sum(release(netlink, n.ifindex, n.address) for n in kept)


def to_neighbour(message: Any) -> Neighbour | None:
    """A decoded RTM_NEWNEIGH or RTM_DELNEIGH; None for what is not a neighbour's address.

    (A bridge's forwarding entries come as the same messages.)
    """
    destination = message.get_attr("NDA_DST")
    if destination is None or message["family"] not in FAMILIES.values():
        return None
    mac = message.get_attr("NDA_LLADDR")
    return Neighbour(
        ifindex=message["ifindex"],
        address=ip_address(destination),
        state=message["state"],
        mac=bytes.fromhex(mac.replace(":", "")) if mac else b"",
        managed=bool((message.get_attr("NDA_FLAGS_EXT") or 0) & NTF_EXT_MANAGED),
        ours=message.get_attr("NDA_PROTOCOL") == PROTOCOL,
    )


def _message(ifindex: int, address: IPAddress) -> Any:
    message = ndmsg()
    message["family"] = FAMILIES[address.version]
    message["ifindex"] = ifindex
    message["attrs"] = [("NDA_DST", str(address))]
    return message
