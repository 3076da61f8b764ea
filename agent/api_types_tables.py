# SPDX-License-Identifier: Apache-2.0
"""As api_types: what the routes answer and take that look into the tables themselves."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, field

from shunt.agent.api_types import Answer, Count, State


class TableBackend(Answer):
    """`due`: what its weight is worth, before rounding."""

    backend: str
    state: State
    weight: Count
    slots: Count
    share: float
    due: float


class Table(Answer):
    protocol: str
    slots: Count
    first_slot: Count
    states: dict[str, Count]
    most_above: float
    most_below: float
    backends: list[TableBackend]


class Maglev(Answer):
    service: str
    tables: list[Table]


class MovedBackend(Answer):
    backend: str
    before: Count
    after: Count
    gained: Count
    lost: Count


class Moved(Answer):
    """`least`: what any table with these shares would have to move."""

    protocol: str
    slots_before: Count
    slots_after: Count
    slots: Count
    moved: Count
    moved_share: float
    least: Count
    least_share: float
    backends: list[MovedBackend]


class Simulation(Answer):
    service: str
    tables: list[Moved]


WeightOf = Annotated[int, Meta(ge=1, le=65535)]


class Simulate(Answer):
    """A change that is asked about; backends as `backend list` names them."""

    add: dict[str, WeightOf] = field(default_factory=dict)
    remove: list[str] = field(default_factory=list)
    drain: list[str] = field(default_factory=list)
    undrain: list[str] = field(default_factory=list)
    weights: dict[str, WeightOf] = field(default_factory=dict)


class Flow(Answer):
    service: str
    client: str
    client_port: Count
    vip: str
    vip_port: Count
    protocol: str
    state: str
    backend: str
    idle_s: float


class Translation(Flow):
    own: str
    own_port: Count
    backend_port: Count


class FlowList(Answer):
    """`more`: there are more than the limit."""

    flows: list[Flow]
    more: bool


class TranslationList(Answer):
    flows: list[Translation]
    more: bool


class RawFrontend(Answer):
    frontend: str
    vip: str
    port: Count
    protocol: str
    svc: Count
    name: str
    mode: str
    first_slot: Count
    log2_slots: Count
    idle_ns: Count


class RawFrontends(Answer):
    frontends: list[RawFrontend]
    more: bool


class RawFlow(Answer):
    """A line of the table of flows; see bpf/abi.h."""

    line: Count
    source: str
    source_port: Count
    destination: str
    destination_port: Count
    protocol: str
    svc: Count
    backend_id: Count
    state: str
    seen_ns: Count
    hash: str
    isn: Count
    word: str
    near: str


class RawFlows(Answer):
    flows: list[RawFlow]
    more: bool


class NatDestination(Answer):
    """`own`: the address of this host that it sees; empty if it has no flow."""

    backend: str
    protocol: str
    own: str
    taken: Count
    ports: Count
    share: float
    refused: Count


class NatDestinations(Answer):
    destinations: list[NatDestination]
    more: bool


class Given(Answer):
    service: str
    vip: str


class Pool(Answer):
    """`size` is text: an IPv6 pool has more addresses than a number of JSON can say."""

    name: str
    networks: list[str]
    size: str
    given: list[Given]


class Pools(Answer):
    pools: list[Pool]
