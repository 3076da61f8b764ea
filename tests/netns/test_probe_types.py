# SPDX-License-Identifier: Apache-2.0
"""Every type of health check against a real server, on the loopback of a namespace of its own.

```
    lo 127.0.0.0/8, ::1    nginx 80, 443 (TLS); dnsmasq 5353; grpc 50051, 50052 (TLS)
```
"""

import asyncio
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from ipaddress import IPv4Address, ip_address
from pathlib import Path

import pytest

from shunt.agent.probes.attempt import Target
from shunt.agent.probes.schedule import Prober
from shunt.lab.netns import Namespace, Process
from shunt.lb.checks import Dns, Grpc, How, Http, Tls, Udp
from shunt.lb.health import Result
from tests.netns.punctuality import judged
from tests.netns.test_probe import probing

LOOPBACK = IPv4Address("127.0.0.1")
READY_S = 30.0

NGINX = """
daemon off; pid {place}/pid; worker_processes 1; error_log stderr;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  server {{
    listen 0.0.0.0:80 backlog=8192; listen [::1]:80;
    listen 127.0.0.1:443 ssl;
    ssl_certificate {place}/cert.pem; ssl_certificate_key {place}/key.pem;
    default_type text/plain;
    location = / {{ return 200 "fine\\n"; }}
    location / {{ return 404; }}
    location = /down {{ return 503; }}
    location = /moved {{ return 302 /down; }}
    location = /host {{ return 200 "host=$http_host method=$request_method\\n"; }}
    location = /query {{ return 200 "args=$args\\n"; }}
  }}
}}
"""
GRPC = """
import sys
from concurrent import futures
import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
server = grpc.server(futures.ThreadPoolExecutor(2))
servicer = health.HealthServicer()
servicer.set("shop.Cart", health_pb2.HealthCheckResponse.SERVING)
servicer.set("shop.Pay", health_pb2.HealthCheckResponse.NOT_SERVING)
health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
pair = [(open(sys.argv[1] + "/key.pem", "rb").read(), open(sys.argv[1] + "/cert.pem", "rb").read())]
assert server.add_insecure_port("127.0.0.1:50051")
assert server.add_secure_port("127.0.0.1:50052", grpc.ssl_server_credentials(pair))
bare = grpc.server(futures.ThreadPoolExecutor(2))
assert bare.add_insecure_port("127.0.0.1:50053")
server.start(), bare.start()
server.wait_for_termination()
"""


def listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def make_certificate(place: Path) -> None:
    """cert.pem and key.pem of a.example."""
    subprocess.run(
        [*("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=a.example"),
         "-addext", "subjectAltName=DNS:a.example",
         "-keyout", str(place / "key.pem"), "-out", str(place / "cert.pem")],
        check=True, capture_output=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Namespace]:
    place = tmp_path_factory.mktemp("servers")
    (place / "nginx.conf").write_text(NGINX.format(place=place))
    make_certificate(place)
    namespace = Namespace.create(f"shunt-types-{os.getpid()}")
    commands = {
        "nginx": ["nginx", "-p", str(place), "-c", "nginx.conf", "-e", "stderr"],
        "dnsmasq": [
            *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file="),
            *("--no-resolv", "--no-hosts", "--user=root", "--port=5353", "--bind-interfaces"),
            *("--listen-address=127.0.0.1", "--host-record=a.example,192.0.2.1"),
            *("--cname=www.a.example,a.example", "--local=/example/"),
        ],
        "grpc": [sys.executable, "-c", GRPC, str(place)],
    }  # fmt: skip
    started: list[Process] = []
    try:
        started += [namespace.start(argv, place / f"{n}.log") for n, argv in commands.items()]
        deadline = time.monotonic() + READY_S
        with namespace.inside():
            while not all(listening(port) for port in (80, 443, 5353, 50051, 50052, 50053)):
                shown = {p.log.name: p.log.read_text()[-500:] for p in started if not p.running}
                assert not shown
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield namespace
    finally:
        for process in started:
            process.stop()
        namespace.delete()


def ask(how: How, port: int, timeout_s: float = 0.5, unanswered: bool = False) -> Result:
    """The first result of a check. On a busy machine one may get no answer: unless that is what is
    asked for, it is made again."""
    found: list[Result] = []

    async def scenario() -> None:
        target = Target(LOOPBACK, port, timeout_s * 1.2, timeout_s, 0.0, how)
        async with probing({"a": target}) as (prober, results), asyncio.timeout(60):
            while not found:
                await asyncio.sleep(0.01)
                assert not prober.counts.troubles
                found.extend(r for r in results["a"] if unanswered or "within" not in r.reason)

    asyncio.run(scenario())
    return found[0]


def good(result: Result) -> bool:
    assert result.ok == (result.reason == ""), result
    assert result.ok == (result.latency_ms is not None)
    return result.ok


UNVERIFIED = Tls(verify=False)


@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize(
    ("how", "port", "reason"),
    [
        (Http(), 80, ""),
        (Http("/down"), 80, "port 80: status 503, expected 200-399"),
        (Http("/down", statuses=((503, 503),)), 80, ""),
        (Http("/moved"), 80, ""),  # not followed: what is there fails
        (Http("/nothing"), 80, "port 80: status 404, expected 200-399"),
        (Http(body="fine"), 80, ""),
        (Http(body="else"), 80, "port 80: the body does not contain 'else'"),
        (Http(headers=(("content-type", "text/plain"),)), 80, ""),
        (Http(headers=(("X-A", ""),)), 80, "port 80: the answer has no header X-A"),
        (Http("/host", "b.example:8", body="host=b.example:8 method=GET"), 80, ""),
        (Http("/host", body="host=127.0.0.1 method=GET"), 80, ""),
        (Http("/host", method="POST", body="method=POST"), 80, ""),
        (Http("/host", method="HEAD"), 80, ""),
        (Http("/query?a=%2Fb&c", body="args=a=%2Fb&c"), 80, ""),
        (Http(), 1, "port 1: connection refused"),
        (Http(), 443, "port 443: status 400, expected 200-399"),  # plain HTTP to TLS
        (Http(), 50051, None),  # what speaks first and is no HTTP/1.1
        (Http(tls=UNVERIFIED, body="fine"), 443, ""),
        (Http(tls=Tls(server_name="a.example")), 443,
         "port 443: certificate: self-signed certificate"),
        (Http(tls=UNVERIFIED), 80, None),
        (Grpc(), 50051, ""),
        (Grpc("shop.Cart"), 50051, ""),
        (Grpc("shop.Pay"), 50051, "port 50051: NOT_SERVING"),
        (Grpc("shop.None"), 50051,
         "port 50051: gRPC status NOT_FOUND: it does not know the service"),
        (Grpc(), 50053, "port 50053: gRPC status UNIMPLEMENTED: no health service"),
        (Grpc("shop.Cart", "a.example", UNVERIFIED), 50052, ""),
        (Grpc(tls=Tls(server_name="a.example")), 50052,
         "port 50052: certificate: self-signed certificate"),
        (Grpc(), 50052, None),
        (Grpc(), 80, None),  # HTTP/1.1
        (Grpc(), 1, "port 1: connection refused"),
        (Dns("a.example."), 5353, ""),
        (Dns("a.example.", answer="192.0.2.1"), 5353, ""),
        (Dns("a.example.", answer="192.0.2.2"), 5353,
         "a.example. A: 192.0.2.1, expected 192.0.2.2"),
        (Dns("www.a.example.", answer="192.0.2.1"), 5353, ""),
        (Dns("b.example."), 5353, "b.example. A: NXDOMAIN, expected NOERROR"),
        (Dns("b.example.", rcode="NXDOMAIN"), 5353, ""),
        (Dns("a.example."), 1, "port 1: connection refused"),
        (Udp(b"x"), 1, "port 1: connection refused"),
        (Udp(b"\x12\x34\x01\0\0\1\0\0\0\0\0\0\1a\7example\0\0\1\0\1", b"\x12\x34"), 5353, ""),
        (Udp(b"\x12\x34\x01\0\0\1\0\0\0\0\0\0\1a\7example\0\0\1\0\1", b"\xc0\0\2\2"), 5353, None),
    ],
)  # fmt: skip
def test_against_a_server(how: How, port: int, reason: str | None) -> None:
    """A reason of None is any: its words are a library's."""
    result = ask(how, port)
    assert good(result) == (reason == "")
    assert result.reason.startswith(f"port {port}: " if reason is None else reason)


@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize("how", [Http(), Http(tls=UNVERIFIED), Grpc(), Udp(b"x"), Dns("a.")])
def test_who_does_not_answer_fails_after_the_timeout(how: How) -> None:
    kind = socket.SOCK_DGRAM if isinstance(how, Udp | Dns) else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, kind) as silent:
        silent.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            silent.listen(10)
        port = silent.getsockname()[1]
        result = ask(how, port, 0.3, unanswered=True)
    assert result.reason == f"port {port}: no answer within 0.3 s"


@pytest.mark.usefixtures("servers")
def test_an_answer_to_another_query_is_none() -> None:
    def answer(query: bytes) -> list[bytes]:
        good = bytearray(query)
        good[2] |= 0x80
        stray = bytearray(good)
        stray[0] ^= 0xFF
        return [bytes(stray), bytes(good)]

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("127.0.0.1", 0))

            def readable() -> None:
                query, client = server.recvfrom(512)
                for datagram in answer(query):
                    server.sendto(datagram, client)

            loop.add_reader(server, readable)
            port = server.getsockname()[1]
            target = Target(LOOPBACK, port, 0.5, 0.4, 0.0, Dns("a.example."))
            async with probing({"a": target}) as (_, results):
                await results.until(lambda: any(r.ok for r in results["a"]))
                assert all(r.ok or "within" in r.reason for r in results["a"])
            loop.remove_reader(server)

    asyncio.run(scenario())


@pytest.mark.usefixtures("servers")
def test_a_loop_that_is_held_up_fails_no_check_of_several_steps() -> None:
    def began(prober: Prober[str], checks: int) -> bool:
        return prober.counts.checks >= checks

    async def scenario() -> None:
        targets = {
            f"{n}": Target(LOOPBACK + n, 80, 2.0, 1.0, 0.0, Http(body="fine")) for n in range(20)
        }
        async with probing(targets) as (prober, results):
            for _ in range(4):
                seen = prober.counts.checks + 5
                await results.until(partial(began, prober, seen))
                time.sleep(1.2)  # noqa: ASYNC251 - this is what is tested
            await results.until(lambda: len(results) == len(targets))
            assert all(r.ok for found in results.values() for r in found), results

    asyncio.run(scenario())


@pytest.mark.usefixtures("servers")
def test_a_loop_held_up_for_longer_than_the_interval_still_gets_results() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()

        def hold_up() -> None:
            time.sleep(0.15)
            loop.call_later(0.01, hold_up)

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
            silent.bind(("127.0.0.1", 0))
            port = silent.getsockname()[1]
            targets = {
                "fine": Target(LOOPBACK, 443, 0.1, 0.05, 0.0, Http(body="fine", tls=UNVERIFIED)),
                "silent": Target(LOOPBACK, port, 0.1, 0.05, 0.0, Dns("a.example.")),
            }
            async with probing(targets) as (_, results):
                hold_up()
                await results.until(lambda: all(results[k] for k in targets))
                assert all(r.ok for r in results["fine"]), results
                assert not any(r.ok for r in results["silent"])

    asyncio.run(scenario())


# Many at once ----------------------------------------------------------------------------------


MANY = 5000
INTERVAL_S, TIMEOUT_S = 2.0, 1.9
LATE_AT_MOST_S = INTERVAL_S / 2


def many() -> dict[str, Target]:
    first = ip_address("127.1.0.0")
    return {
        f"tcp {n}": Target(first + n, 80, INTERVAL_S, TIMEOUT_S, 0.1 if n % 2 else 0.0)
        for n in range(MANY)
    }


def work(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


@pytest.mark.parametrize(
    "hold_up",
    [
        lambda _number: work(0.002),  # no 2,500 a second
        lambda number: work(1.2) if number == 200 else None,
        lambda number: time.sleep(1.2) if number == 200 else None,
    ],
    ids=["each works", "one works", "one sleeps"],
)
def test_that_check_can_fail(hold_up: Callable[[int], None]) -> None:
    """Nobody has to be there: these are late whoever answers."""

    async def scenario() -> None:
        begun = itertools.count(1)

        def slow(_key: str) -> str:
            hold_up(next(begun))
            return "slow"

        prober: Prober[str] = Prober(lambda _key, _result: None, slow)
        with judged(prober) as lateness:
            prober.set_targets(many())
            try:
                async with asyncio.timeout(60):
                    while lateness.fine(LATE_AT_MOST_S):  # noqa: ASYNC110 - tells nobody
                        await asyncio.sleep(0.05)
            finally:
                prober.close()

    asyncio.run(scenario())


def test_a_turn_left_out_for_no_reason_fails_it() -> None:
    async def scenario() -> None:
        prober: Prober[str] = Prober(lambda _key, _result: None)
        with judged(prober) as lateness:
            assert lateness.fine(LATE_AT_MOST_S)
            prober.counts.skipped += 1
            assert not lateness.fine(LATE_AT_MOST_S)

    asyncio.run(scenario())


@pytest.mark.usefixtures("servers")
def test_five_thousand_checks_and_hundreds_of_http_are_not_late() -> None:
    """Others may take the processors for a while, and then nobody could make them in time: what
    of lateness is theirs is told apart."""
    first = ip_address("127.1.0.0") + 8192
    targets = many() | {
        f"http {n}": Target(first + n, 80, 5.0, 4.5, 0.0, Http(body="fine")) for n in range(400)
    }

    async def scenario() -> None:
        async with probing({}) as (prober, results), asyncio.timeout(120):
            with judged(prober) as lateness:
                prober.set_targets(targets)

                def seen() -> bool:
                    enough = prober.counts.checks >= 3 * MANY  # turns
                    return enough and all(results[k] for k in targets)

                while not seen():  # noqa: ASYNC110 - results set no Event
                    await asyncio.sleep(0.2)
                assert lateness.fine(LATE_AT_MOST_S)
            assert not {r.reason for found in results.values() for r in found if not r.ok}
            assert not prober.counts.troubles

    asyncio.run(scenario())
