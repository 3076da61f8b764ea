# SPDX-License-Identifier: Apache-2.0
"""What all calls of sockets have in common when `shunt explain` asks about them."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv6Address
from typing import Any

import numpy as np
from msgspec import UNSET

from shunt.agent.answers import Refused
from shunt.agent.api_types_sockets import ExplainSocket
from shunt.agent.node import Node
from shunt.agent.service_views import Json
from shunt.agent.step_views import Teller
from shunt.kern import cgroup, namespace
from shunt.lb.compile import mapped
from shunt.lb.errors import ShuntError
from shunt.lb.model import IPAddress

VERDICTS = {"PASS": "pass", "TO_BACKEND": "translate", "REFUSED": "refuse"}


class Asked(Teller):
    """One call, asked and told. `address` is the one that it names."""

    def __init__(self, node: Node, asked: ExplainSocket, address: IPAddress) -> None:
        self.node, self.tables, self.btf = node, node.tables, node.datapath.btf
        self.asked, self.address = asked, address
        self.own = namespace.cookie()
        self.netns = self.own if asked.netns is UNSET else asked.netns
        self.packet = {
            "destination": str(plain(address)),
            "destination_port": asked.port,
            "protocol": asked.protocol,
        }

    def groups(self) -> list[int]:
        """Ids of the process's control group and those above it.

        Raises: Refused if there is none of that name.
        """
        root, path = self.node.sockets.cgroup, self.asked.cgroup
        if path is UNSET or root is None:
            return []
        try:
            if ".." in path.split("/"):
                raise ValueError("`..` names none")
            return cgroup.line(root, path)
        except (OSError, ValueError) as e:
            problem = ShuntError(
                f"there is no control group {path[:80]!r}",
                str(e),
                "name it as /proc/PID/cgroup shows it behind `0::`",
            )
            raise Refused(404, problem) from e

    def concluded(
        self,
        reason: str,
        text: str,
        steps: Sequence[Json],
        *,
        service: str = "",
        backend: str = "",
        fix: str = "",
    ) -> Json:
        """The whole, as api_types_sockets.ExplainedSocket."""
        verdict = next(v for begin, v in VERDICTS.items() if reason.startswith(begin))
        label = reason.lower().replace("_", "-")
        facts = {"verdict": verdict, "reason": reason}
        last = {"step": "verdict", "text": f"{text} ({label})", "facts": facts}
        return {
            "verdict": verdict,
            "reason": reason,
            "service": service,
            "backend": backend,
            "text": text,
            "fix": fix,
            "steps": [*steps, last],
        }


def is_mapped(address: IPAddress) -> bool:
    """Whether it is one of IPv4, written as IPv6's."""
    return isinstance(address, IPv6Address) and address.ipv4_mapped is not None


def plain(address: IPAddress) -> IPAddress:
    """The same address; of IPv4 if it is mapped."""
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address


def raw(address: IPAddress) -> Any:
    """As the programs have it."""
    return np.frombuffer(mapped(address), np.uint8)


def senseless(why: str) -> Refused:
    """The answer to a request that is none."""
    problem = ShuntError(
        "the request is not one for explain", why, 'send {"vip": ADDRESS, "port": PORT, ...}'
    )
    return Refused(422, problem)
