# SPDX-License-Identifier: Apache-2.0
"""What the API answers and takes, as types: the OpenAPI document is made from them.

A test holds real answers against them, without a key more or less.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

Count = Annotated[int, Meta(ge=0)]
State = Literal["up", "failing", "draining", "removed"]
PerName = dict[str, Count]


class Answer(Struct, forbid_unknown_fields=True):
    """What all of them have in common: no other keys."""


class Error(Answer):
    """An error's three parts."""

    what: str
    why: str
    fix: str


class Refusal(Answer):
    """Every answer with a status of 400 or more. `errors`: each, where there are several."""

    error: Error
    errors: list[Error] | UnsetType = UNSET


class Errors(Answer):
    errors: list[Error]


class SetAside(Answer):
    """A service of the API that is not in force, and why."""

    service: str
    errors: list[Error]


class Interface(Answer):
    name: str
    ifindex: Count
    mode: str
    program_id: Count
    attached: bool
    tc: str
    xdp: str


class Closing(Answer):
    """Which sockets are closed when their backends go, how, and how many were; `left`: those that
    the last sweep could not close; `barred`: why none of other network namespaces can be, if those
    are covered."""

    which: Literal["udp", "all", "off"]
    by: Literal["iterator", "diagnostics", ""]
    udp: Count
    tcp: Count
    left: Count
    barred: Error | None
    sweeps: Count
    last_ms: float | None


class ExcludedGroup(Answer):
    cgroup: str
    there: bool


class Streams(Answer):
    """Connections that pass TCP by (`redirected`), and that did and do no longer (`tcp`)."""

    attached: bool
    redirected: Count
    tcp: Count
    bytes: Count
    events: PerName


class Sockets(Answer):
    """Whose calls are translated at the socket. `cgroup`: empty if they are not; `whole`: it is
    the root of all, and not a container's part of it."""

    scope: Literal["host", "all", "off"]
    cgroup: str
    whole: bool
    attached: bool
    excluded_cgroups: list[ExcludedGroup]
    excluded_services: list[str]
    node_ports: Literal["reserve", "share"]
    calls: PerName
    closing: Closing
    streams: Streams


class BackendStates(Answer):
    up: Count
    failing: Count
    draining: Count
    removed: Count


class SlotUse(Answer):
    total: Count
    used: Count
    moving: Count
    lingering: Count
    moving_share: float


class Flows(Answer):
    """What the last round of the scan found; null before the first."""

    remembered: Count | None
    exceptions: Count | None
    clients: Count | None
    limit: Count


class Translations(Answer):
    pairs: Count | None
    limit: Count
    ports_busiest: Count | None  # of nat's `ports`, those taken towards the busiest destination
    ports: Count


class Scan(Answer):
    ago_s: float | None
    deleted: Count | None


class Packets(Answer):
    packets: Count
    bytes: Count


class Apply(Answer):
    took_ms: float
    writes: Count
    reloads: Count
    refused: Count


class Checks(Answer):
    made: Count
    failed: Count
    late_ms_mean: float
    late_ms_max: float
    troubles: PerName


class Panicking(Answer):
    """A service of which so few backends are up that all are treated as up."""

    service: str
    up: Count
    backends: Count


class Started(Answer):
    read_s: float
    apply_s: float


class HopProblem(Answer):
    address: str
    what: str
    why: str
    fix: str


class Fill(Answer):
    used: Count
    limit: Count


class Loss(Answer):
    """What was sent and then lost by the kernel or a driver."""

    interface: str
    reason: str
    error: str
    packets: Count


class Status(Answer):
    version: str
    generation: Count
    uptime_s: float
    config_ok: bool
    errors: list[Error]
    set_aside: list[SetAside]
    interfaces: list[Interface]
    sockets: Sockets
    services: Count
    backends: BackendStates
    slots: SlotUse
    flows: Flows
    nat: Translations
    scan: Scan
    reasons: dict[str, Packets]
    events: PerName
    losses: list[Loss]
    apply: Apply
    start: Started
    checks: Checks
    panic: list[Panicking]
    nexthop_problems: list[HopProblem]
    maps: dict[str, Fill]
    problems: list[str]
    config_file: str
    services_directory: str
    state_directory: str


class SlotStates(Answer):
    total: Count
    settled: Count
    moving: Count
    lingering: Count


class ServiceRow(Answer):
    """A service. `origin`: the file and line it stands at, or api. `node`: the networks of which
    this host's own addresses are VIPs, too."""

    name: str
    origin: str
    protocols: list[Literal["tcp", "udp", "sctp"]]
    mode: Literal["dsr-ipip", "dsr-l2", "dsr-geneve", "nat", "local"]
    vips: list[str]
    node: list[str]
    ports: list[str]
    backend_states: BackendStates
    slots: SlotStates
    packets: Count
    bytes: Count


class NextHop(Answer):
    device: str
    via: str
    gateway: bool
    mac: str | None
    mtu: Count


class Checked(Answer):
    """What a backend's checks found."""

    up: bool
    checks: Count
    failures: Count
    last_ok: bool | None
    last_reason: str
    latency_ms: float | None


class BackendRow(Answer):
    """A backend of a service. `configured_weight`: null if it is no longer configured; `server_id`:
    in hexadecimal, null if the service does not route QUIC by it."""

    service: str
    backend: str
    address: str
    port: Count | None
    state: State
    drained: bool
    reason: str
    weight: Count | None
    configured_weight: Count | None
    slots: Count
    share: float
    server_id: str | None
    nexthop: NextHop | None
    health: Checked | None
    packets: Count
    bytes: Count


class CheckRule(Answer):
    type: str
    port: Count | None
    via: str
    interval_s: float
    timeout_s: float
    rise: Count
    fall: Count
    jitter: float
    slow_start_s: float
    panic_threshold: float


class ConnectionIds(Answer):
    """How a service's backends make QUIC connection ids. Lengths in octets."""

    server_id_length: Count
    config_id: Count
    nonce_length: Count


class ServiceShown(ServiceRow):
    """A service with its backends."""

    health: CheckRule | None
    quic: ConnectionIds | None
    sockets: bool
    redirect: bool
    idle_s: dict[str, float]
    backends: list[BackendRow]


class Services(Answer):
    services: list[ServiceRow]


class Backends(Answer):
    backends: list[BackendRow]


class HealthRow(Answer):
    """A backend that is checked, or was until it was removed. Times in ISO 8601."""

    service: str
    backend: str
    type: str | None
    state: Literal["up", "failing", "unknown"]
    removed: bool
    panic: bool
    weight_share: float
    since: str
    checks: Count
    failures: Count
    last_ok: bool | None
    last_at: str | None
    latency_ms: float | None
    reason: str


class Health(Answer):
    health: list[HealthRow]
    panic: list[Panicking]


class Generation(Answer):
    generation: Count


class Deleted(Answer):
    deleted: Count


class Interfaces(Answer):
    interfaces: list[Interface]


class Weight(Answer):
    """0: as configured."""

    weight: Annotated[int, Meta(ge=0, le=65535)]


class OfService(Answer):
    """Of one service; of all without a name."""

    service: str | UnsetType | None = UNSET


class Change(Answer):
    """A line of the watch: what changed, or is (after `snapshot`; `synced` ends what was)."""

    revision: Count
    type: Literal["snapshot", "synced", "service", "backend"]
    change: Literal["present", "added", "changed", "removed"] | UnsetType = UNSET
    service: str | UnsetType = UNSET
    origin: str | UnsetType = UNSET
    mode: str | UnsetType = UNSET
    vips: list[str] | UnsetType = UNSET
    ports: list[str] | UnsetType = UNSET
    backend: str | UnsetType = UNSET
    state: State | UnsetType = UNSET
    weight: Count | UnsetType | None = UNSET


Sample = dict[str, Any]
