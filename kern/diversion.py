# SPDX-License-Identifier: Apache-2.0
"""Has the kernel send marked packets to the loopback device, whatever their destination.

A rule for each family, and a table of its own with one route. What is ours carries our protocol
number, so that it is found again by whoever comes later. Only addresses of this host itself are
looked up before any rule.
"""

from __future__ import annotations

import errno
import socket
from typing import Any

from pyroute2.netlink import rtnl  # type: ignore[import-untyped]
from pyroute2.netlink.rtnl.fibmsg import fibmsg  # type: ignore[import-untyped]
from pyroute2.netlink.rtnl.rtmsg import rtmsg  # type: ignore[import-untyped]

from shunt.kern.neighbours import PROTOCOL
from shunt.kern.netlink import NLM_F_CREATE, NLM_F_REPLACE, RTN_LOCAL, Netlink

FAMILIES = socket.AF_INET, socket.AF_INET6
# Before the rules of tunnels, which often take all that has no mark of theirs.
PRIORITY = 83
TO_TABLE, SCOPE_HOST = 1, 254  # FR_ACT_TO_TBL, RT_SCOPE_HOST
_GONE = (errno.ENOENT, errno.ESRCH)


def divert(netlink: Netlink, mark: int, mask: int, table: int) -> None:
    """Have packets with this mark go to the loopback device, and no others any more.

    Raises: OSError. Then nothing is diverted.
    """
    restore(netlink)
    try:
        for family in FAMILIES:
            _change(netlink, rtnl.RTM_NEWROUTE, _route(family, table))
            rule = _rule(family, table)
            rule["attrs"] += [("FRA_FWMARK", mark), ("FRA_FWMASK", mask)]
            _change(netlink, rtnl.RTM_NEWRULE, rule)
    except OSError:
        restore(netlink)
        raise


def restore(netlink: Netlink) -> int:
    """Take away what `divert` made, also in another process; how many rules there were."""
    removed = 0
    for family in FAMILIES:
        for table in _tables(netlink, family):
            for kind, message in (
                (rtnl.RTM_DELRULE, _rule(family, table)),
                (rtnl.RTM_DELROUTE, _route(family, table)),
            ):
                try:
                    netlink.request(kind, message)
                except OSError as error:
                    if error.errno not in _GONE:
                        raise
            removed += 1
    return removed


def _change(netlink: Netlink, kind: int, message: Any) -> None:
    netlink.request(kind, message, NLM_F_CREATE | NLM_F_REPLACE)


def _tables(netlink: Netlink, family: int) -> list[int]:
    message = fibmsg()
    message["family"] = family
    return [
        int(rule.get_attr("FRA_TABLE") or rule["table"])
        for rule in netlink.dump(rtnl.RTM_GETRULE, message)
        if rule.get_attr("FRA_PROTOCOL") == PROTOCOL
    ]


def _rule(family: int, table: int) -> Any:
    message = fibmsg()
    message["family"], message["action"] = family, TO_TABLE
    message["attrs"] = [
        ("FRA_TABLE", table),
        ("FRA_PRIORITY", PRIORITY),
        ("FRA_PROTOCOL", PROTOCOL),
    ]
    return message


def _route(family: int, table: int) -> Any:
    message = rtmsg()
    message["family"], message["proto"] = family, PROTOCOL
    message["type"], message["scope"] = RTN_LOCAL, SCOPE_HOST
    message["attrs"] = [("RTA_TABLE", table), ("RTA_OIF", socket.if_nametoindex("lo"))]
    return message
