# SPDX-License-Identifier: Apache-2.0
"""What a person reads about a wrong shunt.yaml."""

from pathlib import Path

import pytest

from shunt.agent.sources.file import load
from tests.unit.config_files import SETTINGS, errors, three

SETTINGS_CASES = {
    "nothing": (
        "",
        "1: the file is empty",
        "so does one look that is just being written, and its services would be removed",
        "finish writing it; to have no services, remove the file or leave a comment in it",
    ),
    "comments": (
        "# x\n",
        "1: the file is empty",
        "the file wants interfaces",
        'add "interfaces: [eth0]"',
    ),
    "list": ("[a]", "1: the file is a list", "the file wants a mapping", "correct it"),
    "no interfaces": (
        "xdp: auto\n",
        '1: the file has no "interfaces"',
        "the file wants interfaces",
        'add "interfaces: [eth0]"',
    ),
    "empty interfaces": (
        "interfaces: []\n",
        "1: interfaces is empty",
        "interfaces wants at least 1",
        "correct the value; an example is [eth0]",
    ),
    "interface twice": (
        "interfaces:\n- eth0\n- eth1\n- eth0\n",
        "4: interface eth0 stands twice",
        "it is listed already at shunt.yaml:2",
        "remove one of the two",
    ),
    "interface name": (
        "interfaces: [eth0/1]\n",
        "1: interface eth0/1 is not accepted",
        "interfaces[0] wants an interface name of 1 to 15 characters, without / or :",
        "correct the value; an example is eth0",
    ),
    "unknown key": (
        SETTINGS + "hash_sed: 3\n",
        '2: unknown key "hash_sed"',
        (
            "the file knows interfaces, xdp, hash_seed, mode, echo, sockets, ipip, nat, "
            "masquerade, handover, budgets, metrics, checks, limits, pools"
        ),
        'perhaps "hash_seed" is meant',
    ),
    "unknown key like no other": (
        SETTINGS + "limits: {zzz: 3}\n",
        '2: unknown key "zzz"',
        (
            "limits knows frontends, services, slots, backends, nexthops, sources, rates, "
            "server_ids, flows, nat"
        ),
        "remove it",
    ),
    "key twice": (
        SETTINGS + "xdp: auto\nxdp: auto\n",
        '3: key "xdp" stands twice',
        "the first one is at shunt.yaml:2",
        "keep one of the two",
    ),
    "key of lists": (
        SETTINGS + "? [a]\n: b\n",
        "2: a key is a list or a mapping",
        "the file wants keys that are single words",
        "write it as KEY: VALUE",
    ),
    "no value": (
        SETTINGS + "hash_seed:\n",
        "2: hash_seed has no value",
        "hash_seed wants an integer from 0 to 18446744073709551615",
        "remove the key",
    ),
    "tag": (
        SETTINGS + "hash_seed: !!python/name:os.system 1\n",
        "2: hash_seed has the tag tag:yaml.org,2002:python/name:os.system",
        "hash_seed wants an integer from 0 to 18446744073709551615",
        "remove the tag",
    ),
    "negative seed": (
        SETTINGS + "hash_seed: -1\n",
        "2: hash_seed -1 is out of range",
        "hash_seed wants an integer from 0 to 18446744073709551615",
        "correct it",
    ),
    "large seed": (
        SETTINGS + "hash_seed: 18446744073709551616\n",
        "2: hash_seed 18446744073709551616 is out of range",
        "hash_seed wants an integer from 0 to 18446744073709551615",
        "choose a smaller one, equal on all nodes",
    ),
    "octal or not": (
        SETTINGS + "hash_seed: 010\n",
        "2: hash_seed 010 is not accepted",
        "hash_seed wants an integer from 0 to 18446744073709551615",
        "correct it",
    ),
    "quoted": (
        SETTINGS + "budgets:\n  inserts: '5'\n",
        "3: inserts 5 is not accepted",
        "budgets.inserts wants an integer from 0 to 4294967295",
        "write it without quotes",
    ),
    "mode": (
        SETTINGS + "mode: dsr-ipp\n",
        "2: mode dsr-ipp is not accepted",
        "mode wants dsr-ipip, dsr-l2, dsr-geneve, nat or local",
        'perhaps "dsr-ipip" is meant',
    ),
    "nat ports reversed": (
        SETTINGS + "nat: {ports: 30000-10000}\n",
        "2: ports 30000-10000 ends before it begins",
        "nat.ports wants FIRST-LAST with 1024 ports or more, such as 10000-29999",
        "write 10000-30000",
    ),
    "few nat ports": (
        SETTINGS + "nat: {ports: 10000-11022}\n",
        "2: ports 10000-11022 has only 1023 ports",
        "nat.ports wants FIRST-LAST with 1024 ports or more, such as 10000-29999",
        "correct the line",
    ),
    "nat ports too high": (
        SETTINGS + "nat: {ports: 60000-65536}\n",
        "2: ports 60000-65536 is out of range",
        "nat.ports wants a port from 1 to 65535",
        "correct the line",
    ),
    "nat port alone": (
        SETTINGS + "nat: {ports: 10000}\n",
        "2: ports 10000 is not a range",
        "nat.ports wants FIRST-LAST with 1024 ports or more, such as 10000-29999",
        "correct the line",
    ),
    "host bits": (
        SETTINGS + "ipip: {source4: 198.18.0.1/16}\n",
        "2: source4 198.18.0.1/16 has bits set beyond its prefix",
        "ipip.source4 wants an IPv4 network such as 198.18.0.0/16",
        "write 198.18.0.0/16",
    ),
    "family of a source": (
        SETTINGS + "ipip: {source6: 198.18.0.0/16}\n",
        "2: source6 198.18.0.0/16 is an IPv4 network",
        "ipip.source6 wants an IPv6 network",
        "correct the line",
    ),
    "no network": (
        SETTINGS + "ipip: {source4: nowhere}\n",
        "2: source4 nowhere is not a network",
        "ipip.source4 wants an IPv4 network such as 198.18.0.0/16",
        "correct the line",
    ),
    "large network": (
        SETTINGS + "ipip: {source4: 128.0.0.0/1}\n",
        "2: source4 128.0.0.0/1 is too large",
        "ipip.source4 wants a prefix of /8 or longer",
        "correct the line",
    ),
    "multicast source": (
        SETTINGS + "ipip: {source4: 224.0.0.0/8}\n",
        "2: source4 224.0.0.0/8 is multicast",
        "ipip.source4 wants a unicast network",
        "correct the line",
    ),
    "odd slots": (
        SETTINGS + "limits:\n  slots: 100000\n",
        "3: slots 100000 is not a multiple of 1024",
        "limits.slots wants a multiple of 1024",
        "write 100352",
    ),
    "small table": (
        SETTINGS + "limits: {flows: 3}\n",
        "2: flows 3 is out of range",
        "limits.flows wants an integer from 16 to 268435456",
        "correct it",
    ),
    "not YAML": (
        SETTINGS + "xdp: a: b\n",
        "2: not valid YAML",
        "mapping values are not allowed in this context",
        (
            "correct the indentation or quotes here or just above; "
            "IPv6 addresses in [ ], and values with ': ' in them, need quotes"
        ),
    ),
    "unclosed": (
        "interfaces: [eth0\n",
        "1: not valid YAML",
        "did not find expected ',' or ']' (while parsing a flow sequence)",
        (
            "correct the indentation or quotes here or just above; "
            "IPv6 addresses in [ ], and values with ': ' in them, need quotes"
        ),
    ),
    "control character": (
        SETTINGS + "xdp: \x01\n",
        "2: not valid YAML",
        "character U+0001 may not stand in YAML",
        "remove the character",
    ),
    "two documents": (
        SETTINGS + "---\nxdp: auto\n",
        "2: not valid YAML",
        "a second document begins here",
        "write several services as one list",
    ),
    "undefined alias": (
        SETTINGS + "xdp: *x\n",
        "2: not valid YAML",
        "found undefined alias 'x'",
        "define the anchor above its use, or quote a value that begins with *",
    ),
    "alias in itself": (
        "interfaces: &x [*x]\n",
        "1: not valid YAML",
        "an alias stands inside its own anchor",
        "write the values out plainly, in several files if need be",
    ),
    "deep": (
        "interfaces: " + "[" * 100_000,
        "1: not valid YAML",
        "nested deeper than 32 levels",
        "write the values out plainly, in several files if need be",
    ),
    "a mark of more than its bits": (
        SETTINGS + "checks:\n  table: 7\n  mark: 256\n",
        "4: mark 256 is out of range",
        "checks.mark wants an integer from 1 to 255",
        "correct it",
    ),
    "a table of the kernel's": (
        SETTINGS + "checks:\n  table: 254\n",
        "3: table 254 is the kernel's own",
        "checks.table wants a routing table that nobody else uses",
        "write table: 5348",
    ),
    "metrics without a port": (
        SETTINGS + "metrics: {listen: 127.0.0.1}\n",
        "2: listen 127.0.0.1 is not an address with a port",
        "metrics.listen wants ADDRESS:PORT or [IPV6]:PORT, or off",
        "write 127.0.0.1:9961",
    ),
    "metrics on a bare IPv6 address": (
        SETTINGS + "metrics: {listen: '::1:9961'}\n",
        "2: listen ::1:9961 is not an address with a port",
        "metrics.listen wants ADDRESS:PORT or [IPV6]:PORT, or off",
        "write 127.0.0.1:9961",
    ),
    "metrics on no port": (
        SETTINGS + "metrics: {listen: '[::1]:0'}\n",
        "2: listen [::1]:0 has port 0",
        "metrics.listen wants a port from 1 to 65535",
        "correct the line",
    ),
    "merge": (
        SETTINGS + "<<: [eth0]\n",
        "2: << merges what is not a mapping",
        "the file.<< wants an alias of a mapping",
        "write <<: *ANCHOR",
    ),
}


@pytest.mark.parametrize("case", SETTINGS_CASES)
def test_settings(tmp_path: Path, case: str) -> None:
    text, what, why, fix = SETTINGS_CASES[case]
    assert errors(tmp_path, text) == [three(f"shunt.yaml:{what}", why, fix)]


@pytest.mark.parametrize(
    ("text", "cover", "close"),
    [
        ("", "host", "udp"),
        ("sockets: all\n", "all", "udp"),
        ("sockets: {cover: all, close: all}\n", "all", "all"),
        ("sockets: {close: off}\n", "host", "off"),
    ],
)
def test_sockets_plain_and_with_more(tmp_path: Path, text: str, cover: str, close: str) -> None:
    assert errors(tmp_path, SETTINGS + text) == []
    settings = load(tmp_path / "shunt.yaml", tmp_path / "services.d").settings
    assert (settings.sockets, settings.sockets_close) == (cover, close)


def test_without_xdp_there_are_nat_and_local_alone(tmp_path: Path) -> None:
    service = "name: web\nvip: 203.0.113.10\nports: [80]\nbackends: ['10.0.0.1']\nmode: {}\n"
    for mode in ("nat", "local"):
        assert errors(tmp_path, "interfaces: [eth0]\nxdp: off\n", web=service.format(mode)) == []
    assert errors(tmp_path, "interfaces: [eth0]\nxdp: off\n", web=service.format("dsr-l2")) == [
        three(
            "web.yaml:1: service web is of mode dsr-l2, and xdp is off",
            "without XDP there are the modes nat and local alone",
            "give it one of these, or take `xdp: off` away",
        )
    ]


@pytest.mark.parametrize("vip", ['"2001:db8::10"', '[203.0.113.10, "2001:db8::10"]'])
def test_without_xdp_nothing_changes_its_family(tmp_path: Path, vip: str) -> None:
    text = f"name: web\nvip: {vip}\nports: [80]\nbackends: ['10.0.0.1']\nmode: nat\n"
    assert errors(tmp_path, "interfaces: [eth0]\n", web=text) == []
    assert errors(tmp_path, "interfaces: [eth0]\nxdp: off\n", web=text) == [
        three(
            "web.yaml:1: service web has VIPs and backends of both families, and xdp is off",
            "the XDP program alone translates between IPv4 and IPv6",
            "make it two services, of one family each, or take `xdp: off` away",
        )
    ]
