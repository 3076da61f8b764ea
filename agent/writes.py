# SPDX-License-Identifier: Apache-2.0
"""What a plan is made of: one write each, as `agent/apply.py` performs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shunt.agent.options import DropSources, PutSources
from shunt.lb import slots as slot
from shunt.lb.compile import Endpoint
from shunt.lb.model import Frontend, Protocol


@dataclass(frozen=True, slots=True)
class NameService:
    """A service id belongs to a target."""

    svc: int
    name: str


@dataclass(frozen=True, slots=True)
class PutBackend:
    """A backend id stands for an endpoint of a service."""

    name: str
    svc: int
    endpoint: Endpoint
    id: int
    flags: int
    weight: int


@dataclass(frozen=True, slots=True)
class SetBackend:
    """A backend's flags and its weight of run time."""

    id: int
    flags: int
    weight: int


@dataclass(frozen=True, eq=False, slots=True)
class WriteRegion:
    """A region that nothing refers to yet."""

    first: int
    words: slot.Words
    changed: slot.Times


@dataclass(frozen=True, eq=False, slots=True)
class NewRegion:
    """The same for slots that nobody had before: the owner of each is one of `ids`, by its index.

    A plan for 10,000 services has as many of these; as words they would take 80 MB.
    """

    first: int
    ids: NDArray[np.uint32]
    index: NDArray[Any]

    @property
    def words(self) -> slot.Words:
        return slot.settled(self.ids[self.index])


@dataclass(frozen=True, eq=False, slots=True)
class PatchSlots:
    """Some slots of a region in use, each by one store."""

    name: str
    index: NDArray[np.intp]
    words: slot.Words
    now_ns: int


@dataclass(frozen=True, slots=True)
class PutService:
    """A service record; its region changes by one store."""

    name: str
    svc: int
    first: int
    log2: int
    mode: str
    protocol: Protocol
    idle_ns: int
    flags: int  # enum svc_flag
    options: bytes  # a value of map svc_options


@dataclass(frozen=True, slots=True)
class PutFrontend:
    """A frontend leads to a service. `replaces`: to another one until now."""

    frontend: Frontend
    name: str
    svc: int
    replaces: str = ""


@dataclass(frozen=True, slots=True)
class DropFrontend:
    """A frontend leads nowhere."""

    frontend: Frontend
    name: str


@dataclass(frozen=True, slots=True)
class Grace:
    """Wait until no program runs that may have read what was written over before."""


@dataclass(frozen=True, slots=True)
class ClearService:
    """A service's record and name go; its id waits until no flow names it."""

    name: str
    svc: int


@dataclass(frozen=True, slots=True)
class ClearBackend:
    """A backend is gone; its id waits until no flow names it."""

    name: str
    endpoint: Endpoint
    id: int


@dataclass(frozen=True, slots=True)
class GiveRegion:
    """A region's slots belong to nobody. `heir`: the target that has moved out of it."""

    first: int
    log2: int
    heir: str = ""


Write = (
    NameService
    | PutBackend
    | SetBackend
    | WriteRegion
    | NewRegion
    | PatchSlots
    | PutService
    | PutSources
    | DropSources
    | PutFrontend
    | DropFrontend
    | Grace
    | ClearService
    | ClearBackend
    | GiveRegion
)
