# SPDX-License-Identifier: Apache-2.0
"""What a plan is made of: one write each, as `agent/apply.py` performs it.

There may be 200,000: a Struct is made in a tenth of a dataclass's time, and is smaller.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from shunt.agent.options import DropSources, PutSources
from shunt.agent.quic import DropServerId, PutServerId
from shunt.lb import slots as slot
from shunt.lb.compile import Endpoint
from shunt.lb.model import Frontend, Protocol


class NameService(Struct, frozen=True, gc=False):
    """A service id belongs to a target."""

    svc: int
    name: str


class PutBackend(Struct, frozen=True, gc=False):
    """A backend id stands for an endpoint of a service."""

    name: str
    svc: int
    endpoint: Endpoint
    id: int
    flags: int
    weight: int


class SetBackend(Struct, frozen=True, gc=False):
    """A backend's flags and its weight of run time."""

    id: int
    flags: int
    weight: int


class WriteRegion(Struct, frozen=True, eq=False, gc=False):
    """A region that nothing refers to yet."""

    first: int
    words: slot.Words
    changed: slot.Times


class NewRegion(Struct, frozen=True, eq=False, gc=False):
    """The same for slots that nobody had before: the owner of each is one of `ids`, by its index.

    A plan for 10,000 services has as many of these; as words they would take 80 MB.
    """

    first: int
    ids: NDArray[np.uint32]
    index: NDArray[Any]

    @property
    def words(self) -> slot.Words:
        words: slot.Words = slot.settled(self.ids)[self.index]
        return words


class PatchSlots(Struct, frozen=True, eq=False, gc=False):
    """Some slots of a region in use, each by one store."""

    name: str
    index: NDArray[np.intp]
    words: slot.Words
    now_ns: int


class PutService(Struct, frozen=True, gc=False):
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


class PutFrontend(Struct, frozen=True, gc=False):
    """A frontend leads to a service. `replaces`: to another one until now."""

    frontend: Frontend
    name: str
    svc: int
    replaces: str = ""


class DropFrontend(Struct, frozen=True, gc=False):
    """A frontend leads nowhere."""

    frontend: Frontend
    name: str


class Grace(Struct, frozen=True, gc=False):
    """Wait until no program runs that may have read what was written over before."""


class ClearService(Struct, frozen=True, gc=False):
    """A service's record and name go; its id waits until no flow names it."""

    name: str
    svc: int


class ClearBackend(Struct, frozen=True, gc=False):
    """A backend is gone; its id waits until no flow names it."""

    name: str
    endpoint: Endpoint
    id: int


class GiveRegion(Struct, frozen=True, gc=False):
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
    | PutServerId
    | DropServerId
    | PutFrontend
    | DropFrontend
    | Grace
    | ClearService
    | ClearBackend
    | GiveRegion
)
