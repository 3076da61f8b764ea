# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI document says what a real shuntd answers; the hosts are in shunt_host."""

from __future__ import annotations

import json
import socket
from base64 import b64encode
from ipaddress import ip_address
from typing import Any, cast

import msgspec
import pytest

from shunt.agent.api import Api
from shunt.agent.openapi import ROUTES, document
from shunt.cli.client import Client, Refused
from shunt.cli.frames import make
from tests.netns.shunt_host import Host


def test_every_route_is_described_and_every_description_has_its_route() -> None:
    nothing = cast(Any, None)
    served = {(r.method, r.path) for r in Api(nothing, nothing, nothing).routes()}
    assert served == set(ROUTES)
    shown = json.loads(document())
    described = {(m.upper(), path) for path, item in shown["paths"].items() for m in item}
    assert described == served


def test_every_reference_of_the_document_leads_somewhere(host: Host) -> None:
    shown = Client(host.sock).get("openapi.json")
    assert shown == json.loads(document())
    assert shown["openapi"] == "3.1.0"
    text = json.dumps(shown)
    names = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names == set(shown["components"]["schemas"])


ANSWERS = [
    ("GET", "/v1/status", {}),
    ("GET", "/v1/errors", {}),
    ("GET", "/v1/services", {}),
    ("GET", "/v1/services/{service}", {"service": "web"}),
    ("GET", "/v1/services/{service}", {"service": "empty"}),
    ("GET", "/v1/pools", {}),
    ("GET", "/v1/backends", {}),
    ("GET", "/v1/health", {}),
    ("POST", "/v1/services/{service}/backends/{backend}/drain", {}),
    ("POST", "/v1/services/{service}/backends/{backend}/undrain", {}),
    ("GET", "/v1/services/{service}/maglev", {}),
    ("POST", "/v1/services/{service}/maglev/simulate", {}),
    ("GET", "/v1/bpf/lb", {}),
    ("GET", "/v1/bpf/flows", {}),
    ("GET", "/v1/flows", {}),
    ("GET", "/v1/nat", {}),
    ("POST", "/v1/flows/flush", {}),
    ("POST", "/v1/explain", {}),
    ("POST", "/v1/explain/socket", {}),
    ("GET", "/v1/sockets", {}),
    ("POST", "/v1/reload", {}),
    ("POST", "/v1/programs/swap", {}),
]

FRAME = make((ip_address("10.9.0.9"), 1), (ip_address("203.0.113.10"), 80), "tcp", ["syn"])
BODIES: dict[str, dict[str, Any]] = {
    "/v1/explain": {"frames": [b64encode(FRAME).decode(), "AAAA"]},
    "/v1/explain/socket": {"vip": "203.0.113.10", "port": 80},
}


@pytest.mark.parametrize(("method", "path", "names"), ANSWERS)
def test_real_answers_are_what_the_document_says(
    host: Host, method: str, path: str, names: dict[str, str]
) -> None:
    """A key that is missing, or that agent/api_types.py does not know, fails here."""
    client = Client(host.sock)
    values = {"service": "web", "backend": "10.9.0.2", **names}
    parts = [values.get(part.strip("{}"), part) for part in path.split("/")[2:]]
    with host.here.inside():
        own = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with host.connect("203.0.113.11"), own:
        own.setblocking(False)
        own.connect_ex(("203.0.113.10", 80))  # a row for the list of sockets
        answer = (
            client.get(*parts) if method == "GET" else client.post(*parts, body=BODIES.get(path))
        )
    msgspec.convert(answer, ROUTES[method, path].answer, strict=True)


def test_refusals_are_what_the_document_says(host: Host) -> None:
    with pytest.raises(Refused) as raised:
        Client(host.sock).put("services", "bad", body={"name": "bad"})
    assert raised.value.status == 422
    assert {frozenset(error) for error in raised.value.errors} == {
        frozenset({"what", "why", "fix"})
    }


def test_that_these_checks_can_fail(host: Host) -> None:
    answer = Client(host.sock).get("status")
    with pytest.raises(msgspec.ValidationError, match="surprise"):
        msgspec.convert({**answer, "surprise": 1}, ROUTES["GET", "/v1/status"].answer)
    del answer["slots"]
    with pytest.raises(msgspec.ValidationError, match="slots"):
        msgspec.convert(answer, ROUTES["GET", "/v1/status"].answer)
