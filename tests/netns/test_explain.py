# SPDX-License-Identifier: Apache-2.0
"""`shunt explain` against a real shuntd, and against what becomes of real packets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dpkt
import pytest

from shunt.cli.client import Client, Refused
from shunt.cli.frames import address_port, make
from tests.netns.shunt_host import BACKENDS, CLIENT, DIRECT, EMPTY, HALF, NAT, WEB, Host, refused

ASK = ("explain", "--from", f"{CLIENT}:40000")


def steps(found: Any) -> dict[str, Any]:
    return {step["step"]: step for step in found["steps"]}


def test_a_packet_to_a_service(host: Host) -> None:
    found = host.json(*ASK, "--to", f"{WEB}:80")
    assert (found["verdict"], found["reason"]) == ("tx", "SENT_TO_BACKEND")
    assert found["service"] == "web"
    assert found["backend"] in BACKENDS
    told = steps(found)
    assert told["frontend"]["facts"]["service"] == "web"
    assert told["frontend"]["text"].endswith("service web; scope external")
    policy = {"policy": "every client"}
    assert told["service"]["facts"] == {"mode": "dsr-ipip", "options": [], **policy}
    assert told["slot"]["facts"]["current"] == found["backend"]
    assert told["nexthop"]["facts"]["interface"] == "eth0"
    assert told["rewrite"]["facts"]["destination"] == found["backend"]
    done = host.shunt(*ASK, "--to", f"{WEB}:80")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[0] == f"tcp {CLIENT}:40000 > {WEB}:80 syn, in by eth0"
    assert done.lines(f"sent to backend {found['backend']} of service web (sent-to-backend)")


def test_it_says_where_a_real_packet_went(host: Host) -> None:
    with host.connect(WEB) as client:
        port = client.getsockname()[1]
        found = host.json("explain", "--from", f"{CLIENT}:{port}", "--to", f"{WEB}:80")
    before = {b: host.backend("web", b)["packets"] for b in BACKENDS}
    host.shunt("explain", "--from", f"{CLIENT}:{port}", "--to", f"{WEB}:80")
    assert before == {b: host.backend("web", b)["packets"] for b in BACKENDS}
    assert found["backend"] in BACKENDS


@pytest.mark.parametrize(
    ("options", "reason", "words"),
    [
        (("--to", "203.0.113.99:80"), "PASS_NOT_OURS", "no service has 203.0.113.99:80/tcp"),
        (("--to", f"{WEB}:81"), "PASS_NOT_OURS", "81/tcp is served by nobody"),
        (("--to", f"{EMPTY}:53", "--proto", "udp"), "SENT_UNREACHABLE", "empty has no backend"),
        (("--to", f"{DIRECT}:53", "--proto", "udp"), "SENT_TO_BACKEND", "its MACs alone"),
        (("--to", f"{NAT}:80"), "SENT_TO_BACKEND", "10.9.0.2:8080"),
        (("--to", f"{NAT}:80", "--flags", "ack"), "SENT_RST_NO_FLOW", "no translation is known"),
        (("--to", f"{HALF}:80"), "SENT_TO_BACKEND", "10.9.0.2"),
        (("--to", f"{WEB}:80", "--payload", "1460"), "SENT_TOO_BIG", "MTU"),
    ],
)
def test_every_kind(host: Host, options: tuple[str, ...], reason: str, words: str) -> None:
    found = host.json(*ASK, *options)
    assert found["reason"] == reason
    assert host.shunt(*ASK, *options).lines(words)


def test_what_leaves_is_seen_by_nobody_without_tc(host: Host) -> None:
    done = host.shunt(*ASK, "--to", f"{WEB}:80", "--leaving")
    assert done.code != 0
    assert "TC's programs are not loaded" in done.err


def test_pings_and_ipv6(host: Host) -> None:
    found = host.json("explain", "--proto", "icmp", "--from", CLIENT, "--to", WEB)
    assert found["reason"] == "SENT_ECHO_REPLY"
    found = host.json("explain", "--from", "[2001:db8:c::1]:1", "--to", "[2001:db8::10]:80")
    assert (found["reason"], found["service"]) == ("SENT_TO_BACKEND", "web")
    assert steps(found)["rewrite"]["text"].startswith("wrapped: ")


def test_a_reply_in_mode_nat(host: Host) -> None:
    with host.connect(NAT):
        (flow,) = [f for f in host.json("nat", "list") if f["vip"] == NAT][:1]
        to = f"{flow['own']}:{flow['own_port']}"
        found = host.json("explain", "--from", "10.9.0.2:8080", "--to", to, "--flags", "syn,ack")
    assert found["reason"] == "SENT_TO_CLIENT"
    assert steps(found)["nat-reply"]["facts"] == {"known": True, "service": "translated"}
    assert steps(found)["rewrite"]["facts"]["source"] == NAT


@pytest.mark.parametrize("form", [dpkt.pcap.Writer, dpkt.pcapng.Writer])
def test_a_capture(host: Host, form: Any, tmp_path: Path) -> None:
    client = address_port(f"{CLIENT}:40000", True)
    frames = [make(client, address_port(f"{vip}:80", True), "tcp", ["syn"]) for vip in (WEB, NAT)]
    frames += [bytes(12) + b"\x08\x06" + bytes(28)]
    frames += [make(client, address_port(f"{WEB}:80", True), "tcp", ["ack"], 1000)[:96]] * 300
    path = tmp_path / "some.pcap"
    with path.open("wb") as file:
        writer = form(file)
        for frame in frames:
            writer.writepkt(frame)
    done = host.shunt("explain", "--pcap", str(path))
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert len(lines) == len(frames)
    assert "sent to backend" in lines[0]
    assert lines[2] == "3  ethertype 0x0806: passed to the host's own stack: it is not IP"
    assert all("sent to backend" in line for line in lines[3:]), "what is cut off is filled up"
    told = host.shunt("explain", "--pcap", str(path), "-v")
    assert told.lines("not translated yet")
    json_lines = host.shunt("explain", "--pcap", str(path), "-o", "json").out.splitlines()
    assert len(json_lines) == len(frames)


def test_a_frame_that_cannot_be_tried(host: Host) -> None:
    client = Client(host.sock)
    found = client.post("explain", body={"frames": ["AAAA", "A" * 80]})["packets"]
    assert (found[0]["verdict"], found[1]["verdict"]) == (None, "pass")
    assert found[0]["problem"]["what"] == "a frame of 3 bytes cannot be tried"
    for frames in (None, [], ["$"], [1], "AAAA"):
        with pytest.raises(Refused) as caught:
            client.post("explain", body={"frames": frames})
        assert caught.value.status == 422


def test_what_is_refused(host: Host, tmp_path: Path) -> None:
    refused(host.shunt(*ASK, "--to", f"{WEB}:80", "--on", "lo"), "not on interface lo", "eth0")
    refused(host.shunt(*ASK, "--to", WEB), "is not ADDR:PORT")
    refused(host.shunt(*ASK, "--to", "[2001:db8::10]:80"), "different families")
    refused(host.shunt("explain", "--pcap", str(tmp_path / "none")), "cannot read")
    (tmp_path / "text").write_text("no capture at all, but some text")
    refused(host.shunt("explain", "--pcap", str(tmp_path / "text")), "no capture")
    assert host.shunt("explain").code == 2
    assert host.shunt(*ASK, "--to", f"{WEB}:80", "--flags", "sin").code == 2


def test_after_the_program_was_swapped(own: Host) -> None:
    own.start()
    assert own.json(*ASK, "--to", f"{NAT}:80")["reason"] == "SENT_TO_BACKEND"
    own.shunt("program", "swap")
    with own.connect(NAT) as client:
        port = client.getsockname()[1]
        (flow,) = own.json("nat", "list")
    assert flow["client_port"] == port
    found = own.json("explain", "--from", f"{CLIENT}:{port + 1}", "--to", f"{NAT}:80")
    assert found["reason"] == "SENT_TO_BACKEND"


def test_a_hook_is_named_and_not_run(own: Host) -> None:
    own.start()
    drops = Path(__file__).resolve().parents[1] / "packets/hook_drops.bpf.o"
    own.shunt("hook", "load", str(drops), "--at", "pre-lb", "--bpffs", str(own.bpffs))
    found = own.json(*ASK, "--to", f"{WEB}:80")
    assert found["reason"] == "SENT_TO_BACKEND"
    assert found["steps"][0]["step"] == "hook"
    assert found["steps"][0]["facts"]["position"] == "pre-lb"


def test_without_a_daemon(own: Host) -> None:
    done = own.shunt(*ASK, "--to", f"{WEB}:80")
    assert done.code == 3
    assert "shuntd does not answer" in done.err
    assert "  fix: " in done.err
