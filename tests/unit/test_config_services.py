# SPDX-License-Identifier: Apache-2.0
"""What a person reads about one wrong service."""

from pathlib import Path

import pytest

from tests.unit.config_files import SERVICE, SETTINGS, errors, three

UNICAST = "wants a unicast address that other hosts can reach"
SERVICE_CASES = {
    "single value": (
        "web\n",
        "1: the file is the single value web",
        "the file wants a mapping or a list",
        "correct it",
    ),
    "no name": (
        "vip: 203.0.113.10\nports: [80]\n",
        '1: the file has no "name"',
        "the file wants name, vip and ports",
        'add "name: web"',
    ),
    "no vip": (
        "name: web\nports: [80]\n",
        '1: the file has no "vip"',
        "the file wants name, vip and ports",
        'add "vip: [203.0.113.10]"',
    ),
    "no value": (
        SERVICE + "backends:\n",
        "4: backends has no value",
        "backends wants a list or ADDRESS, ADDRESS:PORT or [IPV6]:PORT",
        "give it one, such as 10.0.0.1:8080",
    ),
    "name": (
        "- name: Web_1\n  vip: 203.0.113.10\n  ports: [80]\n",
        "1: name Web_1 is not accepted",
        (
            "services[0].name wants 1 to 63 of a-z, 0-9, '-', '.' and '/', "
            "a letter or digit first and last"
        ),
        "correct the value; an example is web",
    ),
    "unknown key": (
        SERVICE + "backend: [10.0.0.1]\n",
        '4: unknown key "backend"',
        (
            "the file knows name, vip, ports, backends, mode, echo, sockets, health, idle, "
            "udp_window, slots_per_backend, hash, affinity, sources, rate, quic, redirect"
        ),
        'perhaps "backends" is meant',
    ),
    "vip": (
        "name: web\nvip: 203.0.113\nports: [80]\n",
        "2: vip 203.0.113 is not an address",
        "vip wants an IPv4 or IPv6 address",
        "correct the line",
    ),
    "vip twice": (
        'name: web\nvip:\n- 2001:db8::1\n- "2001:db8:0::1"\nports: [80]\n',
        "4: vip 2001:db8::1 stands twice",
        "this service has it already at web.yaml:3",
        "remove one of the two",
    ),
    "unspecified": (
        "name: web\nvip: 0.0.0.0\nports: [80]\n",
        "2: vip 0.0.0.0 is an unspecified address",
        f"vip {UNICAST}",
        "correct the line",
    ),
    "multicast": (
        "name: web\nvip: [ff02::1]\nports: [80]\n",
        "2: vip ff02::1 is a multicast address",
        f"vip[0] {UNICAST}",
        "correct the line",
    ),
    "loopback": (
        "name: web\nvip: 127.0.0.1\nports: [80]\n",
        "2: vip 127.0.0.1 is a loopback address",
        f"vip {UNICAST}",
        "correct the line",
    ),
    "link-local": (
        "name: web\nvip: fe80::1\nports: [80]\n",
        "2: vip fe80::1 is a link-local address",
        f"vip {UNICAST}",
        "correct the line",
    ),
    "broadcast": (
        "name: web\nvip: 255.255.255.255\nports: [80]\n",
        "2: vip 255.255.255.255 is a broadcast address",
        f"vip {UNICAST}",
        "correct the line",
    ),
    "zone": (
        "name: web\nvip: fe80::1%eth0\nports: [80]\n",
        "2: vip fe80::1%eth0 has a zone",
        "vip wants an address without a zone",
        "use an address without %, not a link-local one",
    ),
    "mapped": (
        'name: web\nvip: "::ffff:203.0.113.1"\nports: [80]\n',
        "2: vip ::ffff:203.0.113.1 is an IPv4 address in IPv6 form",
        "vip wants a plain address",
        "write 203.0.113.1",
    ),
    "port 0": (
        "name: web\nvip: 203.0.113.10\nports: [0]\n",
        "3: port 0 is out of range",
        "ports[0] wants an integer from 1 to 65535 or PORT, PORT/tcp, PORT/udp, PORT/sctp or any",
        "correct the value; an example is 80",
    ),
    "udp port 65536": (
        "name: web\nvip: 203.0.113.10\nports: [65536/udp]\n",
        "3: port 65536 is out of range",
        "ports[0] wants a port from 1 to 65535",
        "correct the line",
    ),
    "dccp": (
        "name: web\nvip: 203.0.113.10\nports: [80, 53/dccp]\n",
        "3: port 53/dccp is not a port",
        "ports[1] wants PORT, PORT/tcp, PORT/udp, PORT/sctp or any",
        "write 80 or 53/udp",
    ),
    "no ports": (
        "name: web\nvip: 203.0.113.10\nports: []\n",
        "3: ports is empty",
        "ports wants at least 1",
        "correct the value; an example is [80, 53/udp]",
    ),
    "port twice": (
        "name: web\nvip: 203.0.113.10\nports:\n- 80\n- 80/tcp\n",
        "5: port 80/tcp stands twice",
        "this service has it already at web.yaml:4",
        "remove one of the two",
    ),
    "backend port": (
        SERVICE + "mode: nat\nbackends: ['10.0.0.1:99999']\n",
        "5: backend 10.0.0.1:99999 has port 99999",
        "backends[0] wants a port from 1 to 65535",
        "correct the line",
    ),
    "backend without brackets": (
        SERVICE + 'mode: nat\nbackends: ["[10.0.0.1]:80"]\n',
        "5: backend [10.0.0.1]:80 is not an address",
        "backends[0] wants HOST:PORT with an IPv4 or [IPv6] host",
        "correct the line",
    ),
    "backend by name": (
        SERVICE + "backends: [server1]\n",
        "4: backend server1 is not an address",
        "backends[0] wants an address, or HOST:PORT with an IPv4 or [IPv6] host",
        "correct the line",
    ),
    "multicast backend": (
        SERVICE + "backends: [10.0.0.1, 224.0.0.1]\n",
        "4: backend 224.0.0.1 is a multicast address",
        f"backends[1] {UNICAST}",
        "correct the line",
    ),
    "backend twice": (
        SERVICE + "backends:\n- 10.0.0.1\n- 10.0.0.2\n- {address: 10.0.0.1, weight: 2}\n",
        "7: backend 10.0.0.1 stands twice",
        "this service has it already at web.yaml:5",
        "remove one of the two",
    ),
    "backend twice, port written out": (
        SERVICE + "mode: nat\nbackends:\n- 10.0.0.1\n- 10.0.0.1:80\n",
        "7: backend 10.0.0.1:80 stands twice",
        "this service has it already at web.yaml:6",
        "remove one of the two",
    ),
    "backend without address": (
        SERVICE + "backends:\n- 10.0.0.1\n- {port: 80}\n",
        '6: backend has no "address"',
        "backends[1] wants address",
        'add "address: 10.0.0.1"',
    ),
    "backend is its VIP": (
        SERVICE + "backends: [203.0.113.10]\n",
        "4: backend 203.0.113.10 is a VIP of its own service",
        "packets would come back to the balancer",
        "name the server's own address",
    ),
    "weight 0": (
        SERVICE + "backends:\n- address: 10.0.0.1\n  weight: 0\n",
        "6: weight 0 is out of range",
        "backends[0].weight wants an integer from 1 to 65535",
        "write 1 to 65535; to take a backend out use `shunt backend drain`",
    ),
    "negative weight": (
        SERVICE + "backends:\n- address: 10.0.0.1\n  weight: -3\n",
        "6: weight -3 is out of range",
        "backends[0].weight wants an integer from 1 to 65535",
        "write 1 to 65535; to take a backend out use `shunt backend drain`",
    ),
    "fractional weight": (
        SERVICE + "backends:\n- {address: 10.0.0.1, weight: 1.5}\n",
        "5: weight 1.5 is not accepted",
        "backends[0].weight wants an integer from 1 to 65535",
        "write 1 to 65535; to take a backend out use `shunt backend drain`",
    ),
    "port in dsr": (
        SERVICE + "mode: dsr-l2\nbackends: [10.0.0.1, '10.0.0.2:8080']\n",
        "5: backend 10.0.0.2:8080 has a port of its own",
        "mode dsr-l2 leaves the packet's port as it is, here 80",
        "remove the port, or use mode: dsr-geneve or nat",
    ),
    "port in dsr, one of several": (
        "name: web\nvip: 203.0.113.10\nports: [80, 443]\nbackends: ['10.0.0.2:80']\n",
        "4: backend 10.0.0.2:80 has a port of its own",
        "mode dsr-ipip leaves the packet's port as it is, here 443",
        "remove the port, or use mode: dsr-geneve or nat",
    ),
    "family in local": (
        SERVICE + "mode: local\nbackends: ['10.0.0.1', '2001:db8::1']\n",
        "5: backend 2001:db8::1 is not of its VIP's family",
        "mode local cannot reach it from 203.0.113.10 (web.yaml:2)",
        "give an IPv4 backend, or use mode: nat",
    ),
    "both families in local": (
        (
            'name: web\nvip: [203.0.113.10, "2001:db8::10"]\nports: [80]\nmode: local\n'
            "backends: [10.0.0.1, 10.0.0.2]\n"
        ),
        "2: vip has addresses of both families",
        "mode local does not translate between IPv4 and IPv6",
        "make it two services, or use mode: nat",
    ),
    "every port in local": (
        "name: web\nvip: 203.0.113.10\nports: [any]\nhealth: none\nmode: local\n",
        "3: ports has any",
        "mode local knows replies by the port that they come from",
        "list the ports, or use mode: nat",
    ),
    "mode": (
        SERVICE + "mode: NAT\nbackends: ['10.0.0.1:8080']\n",
        "4: mode NAT is not accepted",
        "mode wants dsr-ipip, dsr-l2, dsr-geneve, nat or local",
        'perhaps "nat" is meant',
    ),
    "health": (
        SERVICE + "health: tpc\n",
        "4: health tpc is not accepted",
        "health wants none, tcp, http, https, grpc or a mapping",
        'perhaps "tcp" is meant',
    ),
    "health of UDP": (
        "name: web\nvip: 203.0.113.10\nports: [53/udp]\nhealth: tcp\n",
        "4: health has no port to connect to",
        "the service has no TCP port of its own",
        "write health: {type: tcp, port: PORT}, or health: none",
    ),
    "timeout": (
        SERVICE + "health:\n  timeout: 3s\n  interval: 2s\n",
        "5: timeout 3 s is longer than the interval",
        "a check begins every 2 s (web.yaml:6) and must end before the next",
        "shorten the timeout or lengthen the interval",
    ),
    "rise": (
        SERVICE + "health: {rise: 0}\n",
        "4: rise 0 is out of range",
        "health.rise wants an integer from 1 to 255",
        "correct it",
    ),
    "duration": (
        SERVICE + "idle: {udp: 3 weeks}\n",
        "4: idle.udp 3 weeks is not a duration",
        "idle.udp wants seconds, or a number with ms, s, m, h or d",
        "write it as 2s or 10m",
    ),
    "no duration": (
        SERVICE + "idle: {tcp: 0}\n",
        "4: idle.tcp 0 is out of range",
        "idle.tcp wants 1ms to 30d",
        "write it as 2s or 10m",
    ),
    "endless duration": (
        SERVICE + "udp_window: 31d\n",
        "4: udp_window 31d is out of range",
        "udp_window wants 1ms to 30d",
        "write it as 2s or 10m",
    ),
    "infinity": (
        SERVICE + "udp_window: .inf\n",
        "4: udp_window .inf is not a duration",
        "udp_window wants seconds, or a number with ms, s, m, h or d",
        "write it as 2s or 10m",
    ),
    "slots": (
        SERVICE + "slots_per_backend: 0\n",
        "4: slots_per_backend 0 is out of range",
        "slots_per_backend wants an integer from 1 to 65536",
        "correct it",
    ),
    "nothing": (
        "",
        "1: the file is empty",
        "so does one look that is just being written, and its services would be removed",
        "finish writing it; to have no services, remove the file or leave a comment in it",
    ),
    "hash": (
        SERVICE + "hash: source\n",
        "4: hash source is not accepted",
        "hash wants tuple or client",
        "correct it",
    ),
    "redirect of UDP": (
        "name: dns\nvip: 203.0.113.1\nports: [53/udp]\nredirect: on\n",
        "4: redirect redirects nothing",
        "it is for TCP, and the service has no TCP port",
        "remove it",
    ),
    "affinity": (
        SERVICE + "affinity: soon\n",
        "4: affinity soon is not a duration",
        "affinity wants seconds, or a number with ms, s, m, h or d",
        "write it as 2s or 10m",
    ),
    "source": (
        SERVICE + "sources: {allow: 10.0.0.0/33}\n",
        "4: source 10.0.0.0/33 is not a network",
        "sources.allow wants an address, or a network such as 10.0.0.0/8",
        "correct the line",
    ),
    "source bits": (
        SERVICE + "sources:\n  deny:\n  - 10.0.0.1/8\n",
        "6: source 10.0.0.1/8 has bits set beyond its prefix",
        "sources.deny[0] wants an address, or a network such as 10.0.0.0/8",
        "write 10.0.0.0/8",
    ),
    "source twice": (
        SERVICE + "sources:\n  allow: 10.0.0.0/8\n  deny: 10.0.0.0/8\n",
        "6: source 10.0.0.0/8 is denied and allowed",
        "it is allowed at web.yaml:5",
        "remove one of the two",
    ),
    "rate": (
        SERVICE + "rate: {connections: 0}\n",
        "4: connections 0 is not accepted",
        "rate.connections wants a number a second",
        "correct it",
    ),
    "rate of nothing": (
        SERVICE + "rate: {burst: 3}\n",
        '4: rate has no "connections"',
        "rate wants connections",
        'add "connections: "',
    ),
    "rate of UDP": (
        "name: web\nvip: 203.0.113.10\nports: [53/udp]\nrate: {connections: 5}\n",
        "4: rate limits nothing",
        "it limits new connections, and the service has only UDP ports",
        "remove it",
    ),
    "health of every port": (
        "name: web\nvip: 203.0.113.10\nports: any\nhealth: tcp\n",
        "4: health has no port to connect to",
        "the service has no TCP port of its own",
        "write health: {type: tcp, port: PORT}, or health: none",
    ),
    "long value": (
        SERVICE + f"mode: {'x' * 500}\n",
        f"4: mode {'x' * 57}... is not accepted",
        "mode wants dsr-ipip, dsr-l2, dsr-geneve, nat or local",
        "correct it",
    ),
    "value of several lines": (
        SERVICE + 'mode: "a\\nb"\n',
        "4: mode a\\nb is not accepted",
        "mode wants dsr-ipip, dsr-l2, dsr-geneve, nat or local",
        "correct it",
    ),
}


@pytest.mark.parametrize("case", SERVICE_CASES)
def test_service(tmp_path: Path, case: str) -> None:
    text, what, why, fix = SERVICE_CASES[case]
    assert errors(tmp_path, web=text) == [three(f"web.yaml:{what}", why, fix)]


def test_a_clients_hash_has_bits_for_so_many_slots(tmp_path: Path) -> None:
    backends = ", ".join(f"10.0.0.{n}" for n in range(1, 18))
    text = f"{SERVICE}hash: client\nslots_per_backend: 65536\nbackends: [{backends}]\n"
    limits = SETTINGS + "limits: {slots: 2097152}\n"
    assert errors(tmp_path, limits, web=text) == [
        three(
            "web.yaml:4: hash: client with 2097152 slots",
            "a client's hash tells 1048576 slots apart",
            "lower slots_per_backend, or use hash: tuple",
        )
    ]
    assert errors(tmp_path, limits, web=text.replace("hash: client", "hash: tuple")) == []
