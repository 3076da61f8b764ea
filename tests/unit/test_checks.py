# SPDX-License-Identifier: Apache-2.0
"""What counts as a good answer, by type of check; the few bytes of gRPC that are ours."""

import dns.message
import dns.rcode
import dns.rrset
import pytest

from shunt.agent.probes.datagram import judge_answer
from shunt.agent.probes.grpc import request, serving_status
from shunt.lb.checks import Dns, Exec, Http

OK = {"content-type": "text/html; charset=utf-8", "x-a": ""}


@pytest.mark.parametrize(
    ("http", "status", "body", "reason"),
    [
        (Http(), 200, "", ""),
        (Http(), 399, "", ""),
        (Http(), 400, "", "status 400, expected 200-399"),
        (Http(statuses=((200, 200), (404, 404))), 404, "", ""),
        (Http(statuses=((200, 200), (404, 404))), 201, "", "status 201, expected 200, 404"),
        (Http(headers=(("Content-Type", "text/html"),)), 200, "", ""),
        (Http(headers=(("X-A", ""),)), 200, "", ""),
        (Http(headers=(("X-B", ""),)), 200, "", "the answer has no header X-B"),
        (Http(headers=(("Content-Type", "json"),)), 200, "",
         "header Content-Type does not contain 'json'"),
        (Http(body="fine"), 200, "all is fine", ""),
        (Http(body="fine"), 200, "all is lost", "the body does not contain 'fine'"),
    ],
)  # fmt: skip
def test_http(http: Http, status: int, body: str, reason: str) -> None:
    assert http.judge(status, OK, body) == reason


@pytest.mark.parametrize(
    ("wanted", "rcode", "records", "reason"),
    [
        (Dns("a.", answer="192.0.2.1"), "NOERROR", ["A 192.0.2.9", "A 192.0.2.1"], ""),
        (Dns("a."), "NOERROR", [], ""),
        (Dns("a.", answer="192.0.2.1"), "NOERROR", [], "a. A: nothing, expected 192.0.2.1"),
        (Dns("a.", answer="192.0.2.1"), "NOERROR", ["TXT 192.0.2.1"],
         "a. A: nothing, expected 192.0.2.1"),
        (Dns("a."), "SERVFAIL", [], "a. A: SERVFAIL, expected NOERROR"),
        (Dns("a.", rcode="NXDOMAIN"), "NXDOMAIN", [], ""),
    ],
)  # fmt: skip
def test_dns(wanted: Dns, rcode: str, records: list[str], reason: str) -> None:
    answer = dns.message.make_response(dns.message.make_query("a.", "A"))
    answer.set_rcode(dns.rcode.from_text(rcode))
    for record in records:
        kind, data = record.split()
        answer.answer.append(dns.rrset.from_text("a.", 60, "IN", kind, data))
    assert judge_answer(wanted, answer).reason == reason


def test_grpc_messages_are_those_of_protobuf() -> None:
    from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

    for service in ("", "shop.Cart", "x" * 127, "x" * 128, "é" * 127):
        message = HealthCheckRequest(service=service).SerializeToString()
        assert request(service) == b"\0" + len(message).to_bytes(4, "big") + message
    for status in (0, 1, 2, 3):
        message = HealthCheckResponse(status=status).SerializeToString()
        assert serving_status(b"\0" + len(message).to_bytes(4, "big") + message) == status


@pytest.mark.parametrize(
    "raw", [b"", b"\0\0\0\0", b"\1\0\0\0\0", b"\0\0\0\0\2\x08", b"\0\0\0\0\1x"]
)
def test_what_is_no_grpc_answer(raw: bytes) -> None:
    assert serving_status(raw) is None


def test_a_program_is_told_the_backend() -> None:
    argv = Exec(("/bin/x", "--to={address}", "{port}", "$(id)")).command("fd09::1", 80)
    assert argv == ["/bin/x", "--to=fd09::1", "80", "$(id)"]
