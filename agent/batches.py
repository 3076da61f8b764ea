# SPDX-License-Identifier: Apache-2.0
"""Which services a reload changes together, and in what portions others get a turn between."""

from __future__ import annotations

from collections.abc import Mapping

from shunt.agent.tables import Tables
from shunt.lb.compile import target_name
from shunt.lb.model import Service

# So many services are changed before others on the event loop get a turn.
BATCH = 50
# At a start nobody waits; a portion's writes are done and forgotten before the next one's are made.
FIRST = 2500


def in_batches(
    tables: Tables, services: Mapping[str, Service], names: set[str], size: int = BATCH
) -> list[list[str]]:
    """Services to be changed together: first all between which a frontend moves.

    And those whose change may be refused: then nothing has changed.
    """
    together: set[str] = set()
    in_force = tables.placed or len(tables.frontends)
    for name in names & services.keys() if in_force else ():
        service = services[name]
        for target in (target_name(name, p) for p in service.protocols()):
            if place := tables.placed.get(target):
                flags = int(tables.svc["flags"][place.svc])
                if bool(flags & tables.svc_flag["HASH_CLIENT"]) is not (
                    service.hash_by == "client"
                ):
                    together.add(name)
        for frontend in service.frontends():
            own = tables.placed.get(target_name(name, frontend.protocol))
            svc = tables.frontends.get(frontend)
            if svc and (own is None or own.svc != svc):
                together |= {name, tables.name_of(svc).rpartition("/")[0]}
    rest = sorted(names - together)
    batches = [rest[at : at + size] for at in range(0, len(rest), size)]
    return [sorted(together), *batches] if together else batches
