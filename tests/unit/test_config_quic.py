# SPDX-License-Identifier: Apache-2.0
"""QUIC by connection id, as it is written in a service; and what a person reads about mistakes."""

from ipaddress import IPv4Address
from pathlib import Path

import pytest

from shunt.agent.sources.file import load
from shunt.lb.model import Backend, Mode, Quic
from tests.unit.config_files import SERVICE, SETTINGS, errors, three

H3 = "name: web\nvip: 203.0.113.10\nports: [443/udp]\n"
CASES = {
    "quic of TCP": (
        SERVICE + "quic: {server_id_length: 2}\n",
        "4: quic routes nothing",
        "QUIC is UDP, and the service has no UDP port",
        "add a port such as 443/udp, or remove it",
    ),
    "quic of nothing": (
        H3 + "quic: {config_id: 1}\n",
        '4: quic has no "server_id_length"',
        "quic wants server_id_length",
        'add "server_id_length: 2"',
    ),
    "quic with the reserved configuration": (
        H3 + "quic: {server_id_length: 2, config_id: 7}\n",
        "4: config_id 7 is out of range",
        "quic.config_id wants an integer from 0 to 6",
        "correct it",
    ),
    "quic's ids too long": (
        H3 + "quic: {server_id_length: 15, nonce_length: 5}\n",
        "4: server id and nonce have 20 octets",
        "a QUIC connection id has room for 19, after its first octet",
        "lower server_id_length or nonce_length",
    ),
    "server_id without quic": (
        H3 + "backends:\n- {address: 10.0.0.1, server_id: 0001}\n",
        "5: backend 10.0.0.1 has a server_id",
        "the service has no quic, so no packet is routed by it",
        "remove it, or add quic to the service",
    ),
    "quic without server_id": (
        H3 + "quic: {server_id_length: 2}\nbackends:\n- 10.0.0.1\n",
        "6: backend 10.0.0.1 has no server_id",
        "the service routes QUIC by connection id, and none would lead there",
        'write {address: 10.0.0.1, server_id: "0001"}',
    ),
    "server_id of another length": (
        H3 + "quic: {server_id_length: 2}\nbackends:\n- {address: 10.0.0.1, server_id: 0a}\n",
        "6: server_id 0a has 1 octets",
        "quic.server_id_length is 2",
        "write it as 0001, in quotes",
    ),
    "server_id in other digits": (
        H3 + "quic: {server_id_length: 2}\nbackends:\n- {address: 10.0.0.1, server_id: xyzw}\n",
        "6: server_id xyzw is not hexadecimal",
        "backends[0].server_id wants hexadecimal digits",
        "write two digits a byte, such as 0a0b, in quotes",
    ),
    "server_id twice": (
        H3 + "quic: {server_id_length: 1}\nbackends:\n- {address: 10.0.0.1, server_id: 01}\n"
        "- {address: 10.0.0.2, server_id: 01}\n",
        "7: server_id 01 stands twice",
        "this service has it already at web.yaml:6",
        "give each backend one of its own",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes(tmp_path: Path, case: str) -> None:
    text, what, why, fix = CASES[case]
    assert errors(tmp_path, web=text) == [three(f"web.yaml:{what}", why, fix)]


def test_more_server_ids_than_the_limit(tmp_path: Path) -> None:
    backends = "".join(f'- {{address: 10.0.0.{n}, server_id: "{n:02}"}}\n' for n in range(10, 27))
    settings = SETTINGS + "limits: {server_ids: 16}\n"
    (found,) = errors(
        tmp_path, settings, web=H3 + "quic: {server_id_length: 1}\nbackends:\n" + backends
    )
    assert found == three(
        "shunt.yaml:2: 17 server_ids are configured, and 16 fit",
        "limits.server_ids is 16; each backend of a service with quic takes one",
        "raise limits.server_ids to 17 or more",
    )


@pytest.mark.parametrize("mode", ["dsr-ipip", "dsr-l2", "dsr-geneve", "nat"])
@pytest.mark.parametrize("quote", ["", '"'])
def test_digits_are_digits_and_every_mode_keeps_the_id(
    tmp_path: Path, mode: str, quote: str
) -> None:
    text = (
        f"{{name: a, vip: 203.0.113.1, ports: 443/udp, mode: {mode}, "
        "quic: {server_id_length: 2, config_id: 6, nonce_length: 8}, "
        f"backends: [{{address: 10.0.0.1, port: 443, server_id: {quote}0012{quote}}}]}}"
    )
    assert errors(tmp_path, web=text) == []
    (service,) = load(tmp_path / "shunt.yaml", tmp_path / "services.d").services
    assert service.quic == Quic(2, 6, 8)
    port = 443 if Mode(mode).readdresses else 0
    assert service.backends == (Backend(IPv4Address("10.0.0.1"), port, 1, b"\x00\x12"),)
