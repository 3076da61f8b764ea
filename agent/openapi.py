# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI document of the local API, made from the types of its requests and answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from typing import Any

import msgspec

from shunt.agent import api_types as t
from shunt.agent import api_types_explain as explain
from shunt.agent import api_types_sockets as sockets
from shunt.agent import api_types_tables as tables
from shunt.agent.sources.shape import ServiceEntry
from shunt.agent.views import version

Json = dict[str, Any]
TEXT: Json = {"type": "string"}
LIMIT: Json = {"type": "integer", "minimum": 1, "maximum": 100_000, "default": 1000}
NAMES: Mapping[str, Json] = {
    "service": {"type": "string", "minLength": 1, "examples": ["shop"]},
    "backend": {"type": "string", "minLength": 1, "examples": ["10.0.0.1"]},
}
SHOP: Json = {
    "name": "shop",
    "vip": "203.0.113.20",
    "ports": [80, 443],
    "backends": ["10.0.0.1", {"address": "10.0.0.2", "weight": 3}],
}
REVISION: Json = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
NDJSON = "application/x-ndjson"
# Every route may answer with these, whatever it is asked.
EVERYWHERE = (400, 403, 500)


@dataclass(frozen=True)
class Route:
    """One operation."""

    says: str
    answer: Any
    statuses: tuple[int, ...] = ()  # besides EVERYWHERE and that of success
    takes: Any = None
    needs_body: bool = False
    query: Mapping[str, Json] | None = None
    headers: tuple[str, ...] = ()
    created: bool = False
    stream: bool = False


_BACKEND = "/v1/services/{service}/backends/{backend}"
_SERVICE = "/v1/services/{service}"
_OF = {"service": TEXT}
_MATCH = ("If-Match", "If-None-Match")

ROUTES: dict[tuple[str, str], Route] = {
    ("GET", "/v1/status"): Route("How the node is, and what is wrong", t.Status),
    ("GET", "/v1/errors"): Route("Errors of the newest configuration, if it was refused", t.Errors),
    ("GET", "/v1/metrics"): Route("All metrics, in Prometheus' text format", str),
    ("GET", "/v1/services"): Route("Every service", t.Services),
    ("GET", _SERVICE): Route("One service and its backends", t.ServiceShown, (404,)),
    ("PUT", _SERVICE): Route(
        "Add or replace a service of the API", t.ServiceShown, (409, 412, 413, 422),
        takes=ServiceEntry, needs_body=True, headers=_MATCH, created=True,
    ),
    ("DELETE", _SERVICE): Route(
        "Remove a service of the API", t.Generation, (404, 409, 412), headers=_MATCH
    ),
    ("GET", "/v1/pools"): Route("VIP pools, and who has which address", tables.Pools),
    ("GET", "/v1/backends"): Route("Backends, of one service or of all", t.Backends, (404,),
                                   query=_OF),
    ("GET", "/v1/health"): Route("What the checks found, of one service or of all", t.Health,
                                 (404,), query=_OF),
    ("POST", f"{_BACKEND}/drain"): Route("No new flows for a backend", t.BackendRow, (404, 409)),
    ("POST", f"{_BACKEND}/undrain"): Route("New flows again", t.BackendRow, (404, 409)),
    ("PUT", f"{_BACKEND}/weight"): Route(
        "Another weight, from now on", t.BackendRow, (404, 409, 413, 422),
        takes=t.Weight, needs_body=True,
    ),
    ("GET", f"{_SERVICE}/maglev"): Route("A service's tables as they are", tables.Maglev, (404,)),
    ("POST", f"{_SERVICE}/maglev/simulate"): Route(
        "What a change would move; nothing is changed", tables.Simulation, (404, 413, 422),
        takes=tables.Simulate,
    ),
    ("GET", "/v1/bpf/lb"): Route(
        "Frontends as the maps have them", tables.RawFrontends, (404,), query=_OF | {"limit": LIMIT}
    ),
    ("GET", "/v1/bpf/flows"): Route(
        "Lines of the table of flows", tables.RawFlows, (404,), query=_OF | {"limit": LIMIT}
    ),
    ("GET", "/v1/flows"): Route(
        "Remembered flows, in no order", tables.FlowList, (404,), query=_OF | {"limit": LIMIT}
    ),
    ("POST", "/v1/flows/flush"): Route(
        "Forget remembered flows", t.Deleted, (404, 413), takes=t.OfService
    ),
    ("GET", "/v1/nat/top"): Route(
        "Destinations of translations, by ports refused and taken", tables.NatDestinations,
        query={"limit": LIMIT},
    ),
    ("GET", "/v1/nat"): Route(
        "Translations", tables.TranslationList, (404,), query=_OF | {"limit": LIMIT}
    ),
    ("GET", "/v1/monitor"): Route(
        "Dropped packets, or translations that begin and end, as they come", t.Sample, (404,),
        stream=True,
        query={"type": {"enum": ["drop", "nat"], "default": "drop"}}
        | dict.fromkeys(("service", "backend", "network", "reason"), TEXT),
    ),
    ("POST", "/v1/explain"): Route(
        "What would become of packets, step by step; nothing is sent or changed",
        explain.Explanation, (404, 409, 413, 422), takes=explain.Explain, needs_body=True,
    ),
    ("POST", "/v1/explain/socket"): Route(
        "What would become of a process's call, step by step; nothing is changed",
        sockets.ExplainedSocket, (404, 409, 413, 422), takes=sockets.ExplainSocket, needs_body=True,
    ),
    ("GET", "/v1/sockets"): Route(
        "Sockets of this host that have backends in VIPs' places", sockets.SocketList, (404,),
        query=_OF | {"limit": LIMIT},
    ),
    ("GET", "/v1/watch"): Route(
        "Changes of services and backends as they come", t.Change, stream=True,
        query={"since": REVISION},
    ),
    ("POST", "/v1/reload"): Route("Read the files now", t.Generation, (422,)),
    ("POST", "/v1/programs/swap"): Route(
        "Load the program anew, and put it in the old one's place", t.Interfaces, (409,)
    ),
    ("GET", "/v1/openapi.json"): Route("This document", dict[str, Any]),
}  # fmt: skip


@cache
def document() -> bytes:
    """The document, encoded."""
    types = [r.answer for r in ROUTES.values()] + [r.takes for r in ROUTES.values() if r.takes]
    schemas, components = msgspec.json.schema_components(
        [*types, t.Refusal], ref_template="#/components/schemas/{name}"
    )
    by_type = {str(kind): schema for kind, schema in zip([*types, t.Refusal], schemas, strict=True)}
    paths: dict[str, Json] = {}
    for (method, path), route in ROUTES.items():
        paths.setdefault(path, {})[method.lower()] = _operation(path, route, by_type)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "Shunt",
                "description": "The local API of shuntd, on its Unix socket",
                "version": version(),
            },
            "paths": paths,
            "components": {"schemas": components},
        }
    )


def _operation(path: str, route: Route, by_type: Mapping[str, Json]) -> Json:
    parameters = [_parameter(name, "path", NAMES[name]) for name in re.findall(r"\{(\w+)\}", path)]
    parameters += [_parameter(n, "query", schema) for n, schema in (route.query or {}).items()]
    parameters += [_parameter(name, "header", TEXT) for name in route.headers]
    kind = NDJSON if route.stream else "text/plain" if route.answer is str else "application/json"
    good: Json = {"content": {kind: {"schema": by_type[str(route.answer)]}}}
    responses: dict[str, Json] = {"200": {"description": "Done", **good}}
    if route.created:
        responses["201"] = {"description": "Added", **good}
    refusal = {"application/json": {"schema": by_type[str(t.Refusal)]}}
    for status in sorted({*route.statuses, *EVERYWHERE}):
        responses[str(status)] = {"description": HTTPStatus(status).phrase, "content": refusal}
    shown: Json = {"summary": route.says, "parameters": parameters, "responses": responses}
    if route.takes is not None:
        content: Json = {"application/json": {"schema": by_type[str(route.takes)]}}
        if route.takes is ServiceEntry:
            content["application/json"]["example"] = SHOP
            content["application/yaml"] = {"schema": TEXT}
        shown["requestBody"] = {"required": route.needs_body, "content": content}
    return shown


def _parameter(name: str, place: str, schema: Json) -> Json:
    return {"name": name, "in": place, "required": place == "path", "schema": schema}
