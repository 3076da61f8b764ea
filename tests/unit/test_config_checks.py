# SPDX-License-Identifier: Apache-2.0
"""Health checks in the files: what each type becomes, and every way to write one wrongly."""

from pathlib import Path

import pytest

from shunt.agent.sources.file import load
from shunt.lb.checks import Dns, Exec, Grpc, Http, Tls, Udp
from shunt.lb.model import HealthCheck
from tests.unit.config_files import SERVICE, SETTINGS, errors, three

UDP_ONLY = SERVICE.replace("[80]", "[53/udp]")


def health(place: Path, text: str, service: str = SERVICE) -> HealthCheck | None:
    (place / "shunt.yaml").write_text(SETTINGS)
    (place / "services.d").mkdir()
    (place / "services.d" / "web.yaml").write_text(f"{service}health: {text}\n")
    return load(place / "shunt.yaml", place / "services.d").services[0].health


@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("tcp", None),
        ("http", Http()),
        ("https", Http(tls=Tls())),
        ("grpc", Grpc()),
        ("{type: http, status: [204, '300-302'], headers: 'X-A: b'}",
         Http(statuses=((204, 204), (300, 302)), headers=(("X-A", "b"),))),
        ("{type: http, path: /a?b=c, method: HEAD, host: 'a.example:8080', headers: [X-A]}",
         Http("/a?b=c", "a.example:8080", "HEAD", headers=(("X-A", ""),))),
        ("{type: https, verify: off, server_name: a.example, body: 'ok'}",
         Http(body="ok", tls=Tls(False, "a.example"))),
        ("{type: grpc, service: shop.Cart, host: a.example, tls: on}",
         Grpc("shop.Cart", "a.example", Tls())),
        ("{type: dns, port: 53, query: www.Example.com, query_type: aaaa, answer: '2001:DB8:0::1'}",
         Dns("www.Example.com.", "AAAA", "NOERROR", "2001:db8::1")),
        ("{type: dns, port: 53, query: a.example, query_type: CNAME, answer: b.example}",
         Dns("a.example.", "CNAME", "NOERROR", "b.example.")),
        ("{type: udp, port: 53, send: ping, expect_hex: '0A0b'}", Udp(b"ping", b"\n\v")),
        ("{type: exec, argv: [/bin/true, 7, '{address}']}", Exec(("/bin/true", "7", "{address}"))),
    ],
)  # fmt: skip
def test_each_type(tmp_path: Path, text: str, how: object) -> None:
    found = health(tmp_path, text)
    assert found is not None
    assert found.how == how


def test_what_all_types_have(tmp_path: Path) -> None:
    found = health(tmp_path, "{jitter: 12.5%, slow_start: 1m, panic_threshold: 50%}")
    assert found == HealthCheck(jitter=0.125, slow_start_s=60.0, panic_threshold=0.5)


def test_by_way_of_the_vip(tmp_path: Path) -> None:
    assert health(tmp_path, "{via: vip}") == HealthCheck(via="vip")


VIA_NAT = three(
    "in mode nat no check goes by way of the VIP",
    "in mode nat a backend has no VIP: clients' packets come for its own address",
    "remove via: such a check goes to that address and port anyway",
)
VIA_GENEVE = VIA_NAT.replace("mode nat", "mode dsr-geneve")
VIA_EXEC = three(
    "a check of type exec goes by way of no VIP",
    "a program chooses by itself what it sends, and to whom",
    "remove via, or write another type",
)


@pytest.mark.parametrize(
    ("settings", "text", "told"),
    [
        ("", "mode: nat\nhealth:\n  via: vip\n", f"web.yaml:6: {VIA_NAT}"),
        ("mode: nat\n", "health:\n  via: vip\n", f"web.yaml:5: {VIA_NAT}"),
        ("", "mode: dsr-geneve\nhealth:\n  via: vip\n", f"web.yaml:6: {VIA_GENEVE}"),
        ("mode: nat\n", "mode: dsr-l2\nhealth:\n  via: vip\n", None),
        ("", "health: {type: exec, argv: [/bin/true],\n  via: vip}\n", f"web.yaml:5: {VIA_EXEC}"),
    ],
)
def test_what_cannot_go_by_way_of_the_vip(
    tmp_path: Path, settings: str, text: str, told: str | None
) -> None:
    found = errors(tmp_path, SETTINGS + settings, web=SERVICE + text)
    assert found == ([told] if told else [])


def test_via_is_one_of_two(tmp_path: Path) -> None:
    (found,) = errors(tmp_path, web=f"{SERVICE}health:\n  via: VIP\n")
    assert found.startswith("web.yaml:5: via VIP is not accepted")
    assert 'perhaps "vip" is meant' in found


def test_datagrams_go_to_a_udp_port(tmp_path: Path) -> None:
    assert health(tmp_path, "{type: dns, query: a.example}", UDP_ONLY) is not None


WRONG = {
    "key of another type": (
        "{path: /a}",
        "a check of type tcp has no path",
        "path is for type http or https",
        "remove it, or write type: http",
    ),
    "jitter too much": (
        "{jitter: 51%}",
        "jitter 51% is out of range",
        "health.jitter wants a share from 0% to 50%",
        "write it as 10%",
    ),
    "jitter no share": (
        "{jitter: 0.1}",
        "jitter 0.1 is not a share",
        "health.jitter wants a share from 0% to 50%",
        "write it as 10%",
    ),
    "panic no share": (
        "{panic_threshold: half}",
        "panic_threshold half is not a share",
        "health.panic_threshold wants a share from 0% to 100%",
        "write it as 10%",
    ),
    "slow start": (
        "{slow_start: 0}",
        "slow_start 0 is out of range",
        "health.slow_start wants 1ms to 30d",
        "write it as 2s or 10m",
    ),
    "timeout and jitter": (
        "{interval: 2s, timeout: 1900ms, jitter: 10%}",
        "timeout 1.9 s is longer than the interval less its jitter",
        "the next check may begin 1.8 s after a check (web.yaml:4)",
        "shorten the timeout or lengthen the interval",
    ),
    "path": (
        "{type: http, path: health}",
        "path health is not a path",
        "health.path wants a path that begins with /, in ASCII",
        "write it as /health; other characters as %20",
    ),
    "status": (
        "{type: http, status: [200, 299-200]}",
        "status 299-200 is not a status",
        "health.status[1] wants a status from 100 to 599, or FIRST-LAST",
        "write 200 or 200-299",
    ),
    "header": (
        "{type: http, headers: [': x']}",
        "header : x has no name",
        "health.headers[0] wants NAME: TEXT, TEXT being what the header's value contains",
        "write it as 'Content-Type: text/html', in quotes",
    ),
    "body of HEAD": (
        "{type: http, method: HEAD, body: x}",
        "a body is expected of HEAD",
        "the answer to HEAD has none",
        "remove it, or write method: GET",
    ),
    "host": (
        "{type: http, host: 'a b'}",
        "host a b is not a host name",
        "health.host wants a host name",
        "write it as www.example.com",
    ),
    "verify": (
        "{type: https, verify: maybe}",
        "verify maybe is not accepted",
        "health.verify wants off or on",
        "correct it",
    ),
    "server name of http": (
        "{type: http, server_name: a.example}",
        "a check of type http has no server_name",
        "server_name is for type https or grpc",
        "remove it, or write type: https",
    ),
    "no query": (
        "{type: dns, port: 53}",
        'health has no "query"',
        "health wants query for this type",
        "add query: www.example.com",
    ),
    "no name": (
        "{type: dns, port: 53, query: a..b}",
        "query a..b is not a domain name",
        "health.query wants a domain name",
        "write it as www.example.com",
    ),
    "no type": (
        "{type: dns, port: 53, query: a, query_type: AXFR}",
        "query_type AXFR is not a type of record",
        "health.query_type wants a type of record",
        "write A, AAAA, SOA or another",
    ),
    "no rcode": (
        "{type: dns, port: 53, query: a, rcode: FINE}",
        "rcode FINE is not a response code",
        "health.rcode wants a DNS response code",
        "write NOERROR, NXDOMAIN or another",
    ),
    "no port": (
        "{type: dns, query: a}",
        "health has no port to ask",
        "the service has no UDP port of its own",
        "write health: {type: dns, port: PORT}, or health: none",
    ),
    "nothing to send": (
        "{type: udp, port: 7}",
        'health has no "send"',
        "health wants send for this type",
        "add send: ping, or send_hex",
    ),
    "no hexadecimal digits": (
        "{type: udp, port: 7, send_hex: '0g'}",
        "send_hex 0g is not hexadecimal",
        "health.send_hex wants hexadecimal digits",
        "write two digits a byte, such as 0a0b, in quotes",
    ),
    "sent twice": (
        "{type: udp, port: 7, send: a, send_hex: '0a'}",
        "send stands twice",
        "send is text and send_hex is bytes, of the same datagram",
        "remove one of the two",
    ),
    "no program": (
        "{type: exec}",
        'health has no "argv"',
        "health wants argv for this type",
        'add argv: [/usr/local/bin/check, "{address}"]',
    ),
    "no shell": (
        "{type: exec, argv: [check]}",
        "argv begins with check",
        "health.argv wants a program's full path first; there is no shell that would look for it",
        "write it as /usr/local/bin/check",
    ),
    "root": (
        "{type: exec, argv: [/bin/true], user: root}",
        "user root is root",
        "a check runs without privileges",
        "write another user, or remove the key: it is nobody then",
    ),
    "nobody's name": (
        "{type: exec, argv: [/bin/true], user: no-such}",
        "there is no user no-such",
        "health.user wants a user of this host",
        "write the name of one",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong(tmp_path: Path, case: str) -> None:
    text, what, why, fix = WRONG[case]
    expected = [three(f"web.yaml:4: {what}", why, fix)]
    assert errors(tmp_path, web=f"{SERVICE}health: {text}\n") == expected


def test_the_data_of_another_type_of_record(tmp_path: Path) -> None:
    text = "health: {type: dns, port: 53, query: a, answer: b.example}\n"
    (found,) = errors(tmp_path, web=SERVICE + text)
    assert found.startswith(
        "web.yaml:4: answer b.example is not the data of a record of type A\n"
        "  why: health.answer wants what a zone file has after the type"
    )


def test_all_errors_at_once_each_on_its_line(tmp_path: Path) -> None:
    text = "health:\n  type: http\n  path: x\n  jitter: 1\n  send: y\n  status: 42\n"
    found = [error.splitlines()[0] for error in errors(tmp_path, web=SERVICE + text)]
    assert found == [
        "web.yaml:6: path x is not a path",
        "web.yaml:7: jitter 1 is not a share",
        "web.yaml:8: a check of type http has no send",
        "web.yaml:9: status 42 is out of range",
    ]
