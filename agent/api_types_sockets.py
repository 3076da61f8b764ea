# SPDX-License-Identifier: Apache-2.0
"""As api_types: what the routes about sockets take and answer."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from shunt.agent.api_types import Answer, Count, State
from shunt.agent.api_types_explain import Step

Number = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class SocketRow(Answer):
    """A socket and a VIP that it has a backend for; or (`end`) the server's socket of such a
    connection, if both are on this node and its service has `redirect`. `stream`: whether its bytes
    pass TCP by; off: its service does not ask for it; `stream_why`: an event of streams, or
    UNPAIRED: brief, or older than that. `stream_messages`, `stream_bytes`: that it sent and that
    passed TCP by. `netns`: host, the name that `ip netns` has, or
    what /proc/PID/ns/net says. `inode`: as in /proc/PID/fd; 0 if no process has it any more.
    `since_s`: since it connected, or sent there last."""

    protocol: Literal["tcp", "udp"]
    local: str
    local_port: Count
    vip: str
    vip_port: Count
    service: str
    backend: str
    backend_state: State | Literal["gone"]
    state: str
    connected: bool
    netns: str
    netns_cookie: Count
    cgroup: str
    uid: Count
    inode: Count
    since_s: float
    end: Literal["client", "server"]
    stream: Literal["redirected", "tcp", "opening", "off"]
    stream_why: str
    stream_messages: Count
    stream_bytes: Count


class SocketList(Answer):
    """`more`: there are more than the limit."""

    sockets: list[SocketRow]
    more: bool


class ExplainSocket(Answer):
    """A call of a process on this node. `vip`, `port`: the address that it names; with bind, what
    would be bound. `source`: the address that its socket is bound to. `netns`: the cookie of its
    network namespace, as the list of sockets has it; shuntd's own if it is left away. `cgroup`: the
    path of its control group. `ipv6_only`: it has IPV6_V6ONLY."""

    vip: Annotated[str, Meta(min_length=2, max_length=64)]
    port: Annotated[int, Meta(ge=0, le=65535)]
    protocol: Literal["tcp", "udp"] = "tcp"
    call: Literal["connect", "sendto", "bind"] = "connect"
    source: Annotated[str, Meta(max_length=64)] | UnsetType = UNSET
    netns: Number | UnsetType = UNSET
    cgroup: Annotated[str, Meta(max_length=4095)] | UnsetType = UNSET
    ipv6_only: bool = False


class ExplainedSocket(Answer):
    """What would become of the call. `verdict`: the address is left as it is, a backend's is put in
    its place, or the call fails. `service`: with bind, all that have the port. `fix`: what to do
    about a refused bind."""

    verdict: Literal["pass", "translate", "refuse"]
    reason: str
    service: str
    backend: str
    text: str
    fix: str
    steps: list[Step]
