# SPDX-License-Identifier: Apache-2.0
"""The shape of the configuration files, declared once: keys, types, bounds and defaults.

Text that has a form of its own (addresses, durations, ports) is checked further in `values`.
Where a list may be written as a single value, the type says so.
"""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from shunt.lb.checks import Dns, Exec, Http, spans
from shunt.lb.model import HealthCheck, Limits, Quic, RateLimit, Service, Settings

_NODE = Settings(interfaces=())
_LIMITS = Limits()
_SERVICE = Service(name="", vips=(), ports=())
_HEALTH = HealthCheck()
_RATE = RateLimit(1, 1)
_QUIC = Quic(1)
_HTTP, _DNS = Http(), Dns("")


def _text(description: str, *examples: str) -> Meta:
    return Meta(min_length=1, max_length=255, description=description, examples=list(examples))


Interface = Annotated[
    str,
    Meta(
        # The kernel's dev_valid_name(); 15 bytes.
        pattern=r"^(?!\.{1,2}$)[!-.0-9;-~]{1,15}$",
        description="an interface name of 1 to 15 characters, without / or :",
        examples=["eth0"],
    ),
]
Name = Annotated[
    str,
    Meta(
        pattern=r"^[a-z0-9]([a-z0-9./-]{0,61}[a-z0-9])?$",
        description="1 to 63 of a-z, 0-9, '-', '.' and '/', a letter or digit first and last",
        examples=["web", "shop/web"],
    ),
]
Address = Annotated[
    str,
    _text(
        "an IPv4 or IPv6 address, pool/NAME or node/NETWORK",
        *("203.0.113.10", "pool/public", "node/10.0.0.0/8"),
    ),
]
PoolName = Annotated[
    str,
    Meta(
        pattern=r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$",
        description="1 to 32 of a-z, 0-9 and '-', a letter or digit first and last",
        examples=["public"],
    ),
]
PoolNetwork = Annotated[str, _text("a network or an address", "203.0.113.0/28")]
PoolNetworks = (
    Annotated[list[PoolNetwork], Meta(min_length=1, examples=[["203.0.113.0/28"]])] | PoolNetwork
)
BackendAddress = Annotated[str, _text("an IPv4 or IPv6 address", "10.0.0.1")]
PortNumber = Annotated[int, Meta(ge=1, le=65535, examples=[80])]
PortText = Annotated[str, _text("PORT, PORT/tcp, PORT/udp, PORT/sctp or any", "53/udp")]
BackendText = Annotated[str, _text("ADDRESS, ADDRESS:PORT or [IPV6]:PORT", "10.0.0.1:8080")]
DurationNumber = Annotated[float, Meta(description="seconds")]
DurationText = Annotated[str, _text("seconds, or a number with ms, s, m, h or d", "500ms")]
NetworkText = Annotated[str, _text("an address, or a network ADDRESS/BITS", "10.0.0.0/8")]
Duration = DurationNumber | DurationText
Share = Annotated[str, _text("a share in percent", "10%")]
Switch = Literal["off", "on"]
Status = Annotated[int, Meta(ge=100, le=599, examples=[200])]
StatusText = Annotated[str, _text("FIRST-LAST", "200-299")]
HeaderText = Annotated[str, _text("NAME: TEXT", "Content-Type: text/html")]
ServerId = Annotated[str, _text("hexadecimal digits", "0a0b")]
CgroupText = Annotated[
    str,
    Meta(
        min_length=2,
        max_length=4095,
        description="the path of a control group, from the hierarchy's root",
        examples=["/kubepods.slice/sandboxed"],
    ),
]
Word = Annotated[str, _text("text", "/usr/local/bin/check")]
Budget = Annotated[int, Meta(ge=0, le=2**32 - 1)]
ModeName = Literal["dsr-ipip", "dsr-l2", "dsr-geneve", "nat", "local"]


class Shape(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What all mappings of the files have in common.

    A required value that was refused is UNSET in what `typed.Reader` returns.
    """


class Ipip(Shape, frozen=True):
    """Where the outer source addresses of dsr-ipip come from."""

    source4: Annotated[str, _text("an IPv4 network", "198.18.0.0/16")] = str(_NODE.ipip_source4)
    source6: Annotated[str, _text("an IPv6 network", "100::/64")] = str(_NODE.ipip_source6)


class Nat(Shape, frozen=True):
    """This node's source ports in mode nat."""

    ports: Annotated[str, _text("FIRST-LAST with 1024 ports or more", "10000-29999")] = (
        f"{_NODE.nat_port_min}-{_NODE.nat_port_max}"
    )


class Masquerading(Shape, frozen=True):
    """What leaves the node with its address."""

    interfaces: (
        Annotated[list[Interface], Meta(min_length=1, examples=[["eth0"]])] | Interface | UnsetType
    )
    sources: list[NetworkText] | NetworkText = []
    not_to: list[NetworkText] | NetworkText | UnsetType = UNSET


class SocketsEntry(Shape, frozen=True):
    """Which of this host's sockets get backends in VIPs' places."""

    cover: Literal["host", "all", "off"] = _NODE.sockets
    close: Literal["udp", "all", "off"] = _NODE.sockets_close
    exclude: list[CgroupText] | CgroupText = []
    node_ports: Literal["reserve", "share"] = _NODE.node_ports


class Budgets(Shape, frozen=True):
    """What one processor may do in a second."""

    inserts: Budget = _NODE.inserts_per_s
    answers: Budget = _NODE.answers_per_s
    samples: Budget = _NODE.samples_per_s


class Sizes(Shape, frozen=True):
    """Sizes of the maps. Ids are 24 bits wide in a slot, hence some of the bounds."""

    frontends: Annotated[int, Meta(ge=16, le=2**24)] = _LIMITS.frontends
    services: Annotated[int, Meta(ge=16, le=2**20)] = _LIMITS.services
    slots: Annotated[int, Meta(ge=1024, le=2**28)] = _LIMITS.slots
    backends: Annotated[int, Meta(ge=16, le=2**24)] = _LIMITS.backends
    nexthops: Annotated[int, Meta(ge=16, le=2**20)] = _LIMITS.nexthops
    sources: Annotated[int, Meta(ge=16, le=2**24)] = _LIMITS.sources
    rates: Annotated[int, Meta(ge=16, le=2**24)] = _LIMITS.rates
    server_ids: Annotated[int, Meta(ge=16, le=2**24)] = _LIMITS.server_ids
    flows: Annotated[int, Meta(ge=16, le=2**28)] | UnsetType = UNSET
    nat: Annotated[int, Meta(ge=16, le=2**28)] | UnsetType = UNSET


class Metrics(Shape, frozen=True):
    """What is told to Prometheus, and where on the network."""

    listen: Annotated[str, _text("ADDRESS:PORT or [IPV6]:PORT, or off", "127.0.0.1:9961")] = "off"
    detail: Literal["node", "services", "backends"] = _NODE.metrics_detail
    program_times: Switch = "off"


class Checks(Shape, frozen=True):
    """What checks by way of a VIP have for themselves on this host."""

    mark: Annotated[int, Meta(ge=1, le=255)] = _NODE.check_mark
    # 253 to 255 are the kernel's own.
    table: Annotated[int, Meta(ge=1, le=2**32 - 1)] = _NODE.check_table


class SettingsFile(Shape, frozen=True):
    """/etc/shunt/shunt.yaml"""

    interfaces: (
        Annotated[list[Interface], Meta(min_length=1, examples=[["eth0"]])] | Interface | UnsetType
    )
    xdp: Literal["auto", "native", "generic", "off"] = _NODE.xdp_mode
    # msgspec cannot hold the upper bound, 2**64 - 1, as a constraint; the schema can.
    hash_seed: Annotated[int, Meta(ge=0, extra_json_schema={"maximum": 2**64 - 1})] = (
        _NODE.hash_seed
    )
    mode: ModeName = _SERVICE.mode.value
    echo: Switch = "on" if _NODE.echo else "off"
    sockets: Literal["host", "all", "off"] | SocketsEntry = _NODE.sockets
    ipip: Ipip = Ipip()
    nat: Nat = Nat()
    masquerade: Literal["off"] | Masquerading = "off"
    handover: Literal["device", "peer"] = _NODE.handover
    budgets: Budgets = Budgets()
    metrics: Metrics = Metrics()
    checks: Checks = Checks()
    limits: Sizes = Sizes()
    pools: dict[PoolName, PoolNetworks] = {}


class BackendEntry(Shape, frozen=True):
    """A backend written as a mapping."""

    address: BackendAddress | UnsetType
    port: PortNumber | UnsetType = UNSET
    weight: Annotated[
        int,
        Meta(
            ge=1,
            le=65535,
            extra={"fix": "write 1 to 65535; to take a backend out use `shunt backend drain`"},
        ),
    ] = 1
    server_id: ServerId | UnsetType = UNSET


class Health(Shape, frozen=True):
    """A health check written as a mapping; `checks` says which keys are of which type."""

    type: Literal["tcp", "http", "https", "grpc", "dns", "udp", "exec"] = _HEALTH.kind
    port: PortNumber | UnsetType = UNSET
    via: Literal["backend", "vip"] = _HEALTH.via
    interval: Duration = _HEALTH.interval_s
    timeout: Duration = _HEALTH.timeout_s
    rise: Annotated[int, Meta(ge=1, le=255)] = _HEALTH.rise
    fall: Annotated[int, Meta(ge=1, le=255)] = _HEALTH.fall
    jitter: Share = f"{_HEALTH.jitter:.0%}"
    slow_start: Duration | UnsetType = UNSET
    panic_threshold: Share = f"{_HEALTH.panic_threshold:.0%}"
    path: Annotated[str, _text("a path that begins with /", "/health")] = _HTTP.path
    host: Annotated[str, _text("a host name", "www.example.com")] | UnsetType = UNSET
    method: Literal["GET", "HEAD", "OPTIONS", "POST"] = "GET"
    status: list[Status | StatusText] | Status | StatusText = spans(_HTTP.statuses)
    headers: list[HeaderText] | HeaderText = []
    body: Annotated[str, _text("text", "ok")] | UnsetType = UNSET
    tls: Switch = "off"
    verify: Switch = "on"
    server_name: Annotated[str, _text("a host name", "www.example.com")] | UnsetType = UNSET
    service: Annotated[str, _text("the name of a gRPC service", "shop.Cart")] | UnsetType = UNSET
    query: Annotated[str, _text("a domain name", "www.example.com")] | UnsetType = UNSET
    query_type: Annotated[str, _text("a record type", "AAAA")] = _DNS.rdtype
    rcode: Annotated[str, _text("a DNS response code", "NXDOMAIN")] = _DNS.rcode
    answer: Annotated[str, _text("a record's data", "192.0.2.1")] | UnsetType = UNSET
    send: Annotated[str, _text("text", "ping")] | UnsetType = UNSET
    send_hex: Annotated[str, _text("hexadecimal digits", "0a0b")] | UnsetType = UNSET
    expect: Annotated[str, _text("text", "pong")] | UnsetType = UNSET
    expect_hex: Annotated[str, _text("hexadecimal digits", "0a0b")] | UnsetType = UNSET
    argv: (
        Annotated[list[Word], Meta(min_length=1, examples=[["/usr/local/bin/check"]])] | UnsetType
    ) = UNSET
    user: Annotated[str, _text("a user's name", "nobody")] = Exec(()).user


class Idle(Shape, frozen=True):
    """After how long a silent flow may be forgotten."""

    tcp: Duration = _SERVICE.tcp_idle_s
    udp: Duration = _SERVICE.udp_idle_s


class Sources(Shape, frozen=True):
    """Which clients are served: the longest prefix that a client is in decides."""

    allow: list[NetworkText] | NetworkText = []
    deny: list[NetworkText] | NetworkText = []


class Rate(Shape, frozen=True):
    """How many new TCP connections and SCTP associations a client network may open."""

    connections: Annotated[float, Meta(gt=0, le=1e6, description="a number a second")] | UnsetType
    burst: Annotated[int, Meta(ge=1, le=2**20)] | UnsetType = UNSET
    prefix4: Annotated[int, Meta(ge=1, le=32)] = _RATE.prefix4
    prefix6: Annotated[int, Meta(ge=1, le=128)] = _RATE.prefix6


class ConnectionIds(Shape, frozen=True):
    """How backends make QUIC connection ids."""

    server_id_length: Annotated[int, Meta(ge=1, le=15, examples=[2])] | UnsetType
    config_id: Annotated[int, Meta(ge=0, le=6)] = _QUIC.config_id
    nonce_length: Annotated[int, Meta(ge=4, le=18)] = _QUIC.nonce_length


class ServiceEntry(Shape, frozen=True):
    """A service of /etc/shunt/services.d/*.yaml"""

    name: Name | UnsetType
    vip: (
        Annotated[list[Address], Meta(min_length=1, examples=[["203.0.113.10"]])]
        | Address
        | UnsetType
    )
    ports: (
        Annotated[list[PortNumber | PortText], Meta(min_length=1, examples=[[80, "53/udp"]])]
        | PortNumber
        | PortText
        | UnsetType
    )
    backends: list[BackendText | BackendEntry] | BackendText = []
    mode: ModeName | UnsetType = UNSET
    echo: Switch | UnsetType = UNSET
    sockets: Switch = "on"
    health: Literal["none", "tcp", "http", "https", "grpc"] | Health | UnsetType = UNSET
    idle: Idle = Idle()
    udp_window: Duration = _SERVICE.udp_window_s
    slots_per_backend: Annotated[int, Meta(ge=1, le=65536)] = _SERVICE.slots_per_backend
    hash: Literal["tuple", "client"] = _SERVICE.hash_by
    affinity: Literal["none"] | Duration = "none"
    sources: Sources = Sources()
    rate: Literal["none"] | Rate = "none"
    quic: Literal["none"] | ConnectionIds = "none"
    redirect: Switch = "off"


ServicesFile = ServiceEntry | list[ServiceEntry]
