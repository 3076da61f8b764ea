# SPDX-License-Identifier: Apache-2.0
"""Random files: whatever stands in them, loading gives a configuration or errors with lines."""

import copy
import tempfile
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from shunt.agent.sources.file import ConfigErrors, load
from shunt.agent.sources.kinds import fields_of
from shunt.agent.sources.shape import Shape
from shunt.agent.sources.store import State
from shunt.ipam.pools import Request
from shunt.lb.model import (
    Backend,
    Configuration,
    HealthCheck,
    IPAddress,
    Limits,
    Mode,
    Pool,
    Port,
    Protocol,
    Service,
    Settings,
)

KEYS = sorted({key for shape in Shape.__subclasses__() for key in fields_of(shape)} | {"<<"})
WORDS = [
    "eth0",
    "auto",
    "native",
    "generic",
    "dsr-ipip",
    "dsr-l2",
    "dsr-geneve",
    "nat",
    "none",
    "tcp",
    "udp",
    "web",
    "203.0.113.1",
    "10.0.0.1",
    "10.0.0.1:80",
    "2001:db8::1",
    "[2001:db8::1]:80",
    "53/udp",
    "3868/sctp",
    "10000-29999",
    "198.18.0.0/16",
    "100::/64",
    "2s",
    "500ms",
    "null",
    "~",
    "yes",
    "0x10",
    "010",
    "1_0",
    ".inf",
    ".nan",
    "1e400",
    "10:20",
    "2001-01-01",
    "=",
    "<<",
    "::ffff:1.2.3.4",
    "fe80::1%x",
    "pool/public",
    "pool/",
    "node/10.0.0.0/8",
    "node/",
    "public",
    "203.0.113.0/28",
]

scalars = (
    st.sampled_from(WORDS)
    | st.text(max_size=8)
    | st.integers()
    | st.integers(0, 100)
    | st.floats()
    | st.booleans()
    | st.none()
)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner, max_size=6)
    ),
    max_leaves=25,
)


def load_texts(
    settings: str | bytes, services: str | bytes, state: State | None = None
) -> Configuration:
    """What `load` gives for one file of each kind."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "services.d").mkdir()
        for path, text in (
            (place / "shunt.yaml", settings),
            (place / "services.d/x.yaml", services),
        ):
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(place / "shunt.yaml", place / "services.d", state)


def outcome(
    settings: str | bytes, services: str | bytes, state: State | None = None
) -> Configuration | ConfigErrors:
    """What comes of two files, after checking what must hold whatever stands in them."""
    found: Configuration | ConfigErrors
    try:
        found = load_texts(settings, services, state)
    except ConfigErrors as raised:
        found = raised
    if isinstance(found, Configuration):
        assert found == load_texts(settings, services, state)
        hash(found)
        return found
    assert found.errors
    for error in found.errors:
        assert error.line >= 1
        assert error.what
        assert error.why
        assert error.fix
        assert len(error.text().splitlines()) == 3
    return found


@given(trees, trees)
def test_any_tree(settings: Any, services: Any) -> None:
    outcome(yaml.safe_dump(settings), yaml.safe_dump(services, default_flow_style=True))


@given(st.binary(max_size=60) | st.text("[]{}&*!|>-:,#'\"%@` \n\tab<0\x85\u2028", max_size=40))
@example("&a [*a]")
@example("? [a]\n: 1")
@example("interfaces: !!binary x")
@example(b"\xef\xbb\xbf")
@example("--- \n...\n--- \n")
@example("%YAML 9.9\n---\na: 1")
@example("<<: &a {<<: *a}")
def test_any_text(text: str | bytes) -> None:
    outcome(text, "")
    outcome("interfaces: [eth0]", text)


# Valid configurations, as the model; `written` says them as an operator would.

addresses4 = st.integers(0x0B000000, 0x7EFFFFFF).map(IPv4Address)
addresses6 = st.integers(0x2001 << 112, (0x2002 << 112) - 1).map(IPv6Address)
port_numbers = st.integers(1, 65535)
durations = st.integers(1, 86400).map(float)
MODES = tuple(Mode)


@st.composite
def healths(draw: st.DrawFn) -> HealthCheck | None:
    if draw(st.booleans()):
        return None
    timeout, more = draw(st.integers(1, 99)), draw(st.integers(0, 99))
    counts = st.integers(1, 255)
    return HealthCheck(
        "tcp",
        draw(port_numbers),
        float(timeout + more),
        float(timeout),
        draw(counts),
        draw(counts),
        slow_start_s=draw(durations),
        panic_threshold=draw(st.integers(0, 100)) / 100,
    )


@st.composite
def service_models(draw: st.DrawFn, name: str, vips: tuple[IPAddress, ...]) -> Service:
    port = st.builds(Port, port_numbers, st.sampled_from(Protocol))
    ports = tuple(draw(st.lists(port, min_size=1, max_size=3, unique=True)))
    sctp = any(port.protocol is Protocol.SCTP for port in ports)
    mode = draw(st.sampled_from(MODES))
    families = {vip.version for vip in vips}
    addresses = addresses4 | addresses6
    one_family = mode is Mode.LOCAL or (mode is Mode.NAT and sctp)
    if mode is Mode.DSR_GENEVE and sctp:
        mode = Mode.DSR_L2
    if one_family and len(families) == 2:
        mode = Mode.DSR_L2
    elif one_family:
        addresses = addresses4 if families == {4} else addresses6
    numbers = st.just(0) if sctp or not mode.readdresses else st.just(0) | port_numbers
    backend = st.builds(Backend, addresses, numbers, st.integers(1, 65535))
    return Service(
        name=name,
        vips=vips,
        ports=ports,
        mode=mode,
        # Told apart by address alone: 10.0.0.1 and 10.0.0.1:80 may be the same.
        backends=tuple(
            b
            for b in draw(st.lists(backend, max_size=4, unique_by=lambda b: b.address))
            if b.address not in vips
        ),
        health=draw(healths()),
        tcp_idle_s=draw(durations),
        udp_idle_s=draw(durations),
        udp_window_s=draw(durations),
        slots_per_backend=draw(st.integers(1, 1000)),
    )


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    names = draw(st.sets(st.from_regex(r"[a-z0-9]([a-z0-9./-]{0,9}[a-z0-9])?", fullmatch=True)))
    vips = draw(
        st.lists(
            addresses4 | addresses6, min_size=2 * len(names), max_size=2 * len(names), unique=True
        )
    )
    services = [
        draw(service_models(name, tuple(vips[2 * at : 2 * at + draw(st.integers(1, 2))])))
        for at, name in enumerate(sorted(names))
    ]
    first = draw(st.integers(1, 60000))
    size = st.integers(16384, 2**20)
    budget = st.integers(0, 2**32 - 1)
    settings = Settings(
        interfaces=tuple(
            draw(
                st.lists(
                    st.from_regex(r"[a-z][a-z0-9.@_-]{0,14}", fullmatch=True),
                    min_size=1,
                    max_size=3,
                    unique=True,
                )
            )
        ),
        xdp_mode=draw(st.sampled_from(("auto", "native", "generic"))),
        hash_seed=draw(st.integers(0, 2**64 - 1)),
        ipip_source4=IPv4Network((draw(st.integers(11, 99)) << 24, 8)),
        ipip_source6=IPv6Network((draw(addresses6), 128)),
        nat_port_min=first,
        nat_port_max=draw(st.integers(first + 1023, 65535)),
        limits=Limits(
            draw(size), draw(size), 2**20, draw(size), draw(size), draw(size), draw(size)
        ),
        inserts_per_s=draw(budget),
        answers_per_s=draw(budget),
        samples_per_s=draw(budget),
    )
    return Configuration(settings, tuple(services), draw(vip_pools()))


@st.composite
def vip_pools(draw: st.DrawFn) -> tuple[Pool, ...]:
    """Nobody asks for them; no two have an address in common."""
    found = st.sets(st.from_regex(r"[a-z0-9]([a-z0-9-]{0,5}[a-z0-9])?", fullmatch=True), max_size=3)
    return tuple(
        Pool(name, (IPv4Network(f"203.{n}.{draw(st.integers(0, 255))}.0/{24 + n}"),))
        for n, name in enumerate(sorted(draw(found)))
    )


def written_settings(settings: Settings) -> dict[str, Any]:
    limits = settings.limits
    return {
        "interfaces": list(settings.interfaces),
        "xdp": settings.xdp_mode,
        "hash_seed": settings.hash_seed,
        "ipip": {"source4": str(settings.ipip_source4), "source6": str(settings.ipip_source6)},
        "nat": {"ports": f"{settings.nat_port_min}-{settings.nat_port_max}"},
        "budgets": {
            "inserts": settings.inserts_per_s,
            "answers": settings.answers_per_s,
            "samples": settings.samples_per_s,
        },
        "limits": {name: getattr(limits, name) for name in Limits.__slots__},
    }


def written_backend(backend: Backend) -> Any:
    if backend.weight == 1:
        return str(backend)
    entry = {"address": str(backend.address), "weight": backend.weight}
    return entry | ({"port": backend.port} if backend.port else {})


def written_service(service: Service) -> dict[str, Any]:
    health = service.health
    return {
        "name": service.name,
        "vip": [str(vip) for vip in service.vips],
        "ports": [str(port) for port in service.ports],
        "mode": service.mode.value,
        "backends": [written_backend(backend) for backend in service.backends],
        "health": "none"
        if health is None
        else {
            "type": "tcp",
            "port": health.port,
            "interval": health.interval_s,
            "timeout": f"{health.timeout_s * 1000:.0f}ms",
            "rise": health.rise,
            "fall": health.fall,
            "slow_start": health.slow_start_s,
            "panic_threshold": f"{health.panic_threshold:.0%}",
        },
        "idle": {"tcp": f"{service.tcp_idle_s:.0f}s", "udp": service.udp_idle_s},
        "udp_window": int(service.udp_window_s),
        "slots_per_backend": service.slots_per_backend,
    }


def written(wanted: Configuration) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    pools = {pool.name: [str(network) for network in pool.networks] for pool in wanted.pools}
    settings = written_settings(wanted.settings) | {"pools": pools}
    return settings, [written_service(s) for s in wanted.services]


@given(configurations())
def test_valid_configurations_come_back_as_written(wanted: Configuration) -> None:
    settings, services = written(wanted)
    found = outcome(yaml.safe_dump(settings), yaml.safe_dump(services))
    if isinstance(found, ConfigErrors):
        raise found
    assert found == wanted
    assert hash(found) == hash(wanted)


def spots(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a tree with every key or index in it."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(pairs):
        yield tree, key
        if isinstance(value, dict | list):
            yield from spots(value)


@given(configurations(), st.data())
def test_valid_configurations_with_something_changed(wanted: Configuration, data: Any) -> None:
    trees_written = copy.deepcopy(list(written(wanted)))
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(
            st.sampled_from(list(spots(trees_written))[2:] or [(trees_written, 0)])
        )
        change = data.draw(st.sampled_from(["replace", "remove", "copy", "rename"]))
        if container is trees_written or change == "replace":
            container[key] = data.draw(scalars | trees)
        elif change == "remove":
            del container[key]
        elif isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        elif change == "rename":
            container[data.draw(st.sampled_from(KEYS))] = container.pop(key)
        if not all(isinstance(tree, dict | list) for tree in trees_written):
            break
    settings, services = (yaml.safe_dump(tree) for tree in trees_written)
    outcome(settings, services)


vips = st.sampled_from(["pool/p", "pool/q", "pool/r", *(f"10.0.0.{n}" for n in range(5))])


@given(st.lists(st.lists(vips, min_size=1, max_size=3), max_size=6), st.data())
def test_services_of_pools_keep_their_addresses(asked: list[list[str]], data: Any) -> None:
    """In any order, and with what was given before: the same; and nobody has another's."""
    node = {"interfaces": ["eth0"], "pools": {"p": "10.0.0.0/30", "q": ["2001:db8::/126"]}}
    services = [{"name": f"s{n}", "vip": v, "ports": [80 + n]} for n, v in enumerate(asked)]
    found = outcome(yaml.safe_dump(node), yaml.safe_dump(services))
    if isinstance(found, ConfigErrors):
        return
    turned = data.draw(st.permutations(services))
    assert outcome(yaml.safe_dump(node), yaml.safe_dump(turned)) == found
    given_to = {address: name for pool in found.pools for name, address in pool.given}
    assert len(given_to) == sum(len(pool.given) for pool in found.pools)
    for service in found.services:
        assert all(given_to.get(vip, service.name) == service.name for vip in service.vips)
    held = {Request(name, p.name): address for p in found.pools for name, address in p.given}
    more = [{"name": "aa", "vip": "pool/p", "ports": [8080]}, *turned]
    later = outcome(yaml.safe_dump(node), yaml.safe_dump(more), State({}, held))
    if isinstance(later, Configuration):
        assert later.services[1:] == found.services


def test_these_checks_can_fail() -> None:
    """The outcome of a wrong file is errors, and a changed file is another configuration."""
    service = "{name: a, vip: 203.0.113.1, ports: 80}"
    right = outcome("interfaces: [eth0]", service)
    assert isinstance(right, Configuration)
    assert isinstance(outcome("interfaces: [eth0]", service.replace("80", "0")), ConfigErrors)
    assert right != outcome("interfaces: [eth0]", service.replace("80", "81"))
