# SPDX-License-Identifier: Apache-2.0
"""The decision of sockets, asked without one, on the tables of a balancer under test."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from shunt.kern.objects import Object
from shunt.kern.testrun import run_syscall
from shunt.sockops.attach import OBJECT, share
from tests.packets.balancer import START_NS, mapped

with Object(OBJECT) as _object:
    SockReason: Any = _object.btf.enum("sock_reason", "SOCK_")
    Family: Any = _object.btf.enum("sock_family", "SOCK_")
    TRY = _object.btf.struct("sock_try")

TAKEN = SockReason.TO_BACKEND_CONNECT
BOTH: int = Family.IPV4 | Family.IPV6


class Loaded(Protocol):
    """Whatever has a balancer's tables."""

    object: Object


class Asker:
    """The syscall program beside a balancer's maps."""

    def __init__(self, lb: Loaded) -> None:
        self.object = Object(OBJECT)
        share(self.object, lb.object.maps)
        self.object.keep_programs("shunt_sock_try")
        self.object.load()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None
    ) -> None:
        self.object.close()

    def ask(
        self,
        vip: str,
        port: int,
        proto: int = 6,
        *,
        entropy: int = 0,
        netns: int = 1,
        families: int = BOTH,
        now_ns: int = START_NS,
        kept: Any = None,
    ) -> Any:
        """One question. Returns struct sock_answer."""
        context = np.zeros((), TRY)
        ask = context["ask"]
        ask["vip"], ask["port"], ask["proto"] = mapped(vip), port, proto
        ask["entropy"], ask["netns"], ask["families"] = entropy, netns, families
        ask["now_ns"] = now_ns
        if kept is not None:
            ask["kept"] = kept
        raw = run_syscall(self.object.programs["shunt_sock_try"].fd, context.tobytes())
        return np.frombuffer(raw, TRY)[0]["answer"]


def kept(answer: Any, vip: str, port: int, seen_ns: int) -> Any:
    """What a socket remembers of an answer: struct sock_flow."""
    flow = np.zeros((), TRY["ask"]["kept"])
    flow["vip"], flow["vip_port"] = mapped(vip), port
    for name in ("addr", "port", "backend"):
        flow[name] = answer[name]
    flow["seen_ns"] = seen_ns
    return flow
