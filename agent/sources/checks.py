# SPDX-License-Identifier: Apache-2.0
"""From the shape of a health check to a HealthCheck, with the rules between its keys."""

import pwd
import re
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import dns.exception
import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
from msgspec import UNSET, UnsetType

from shunt.lb.checks import Dns, Exec, Grpc, How, Http, Tls, Udp
from shunt.lb.model import HealthCheck, Mode, Port, Protocol

from . import values
from .kinds import any_of, fields_of
from .problems import shown
from .shape import Health, ServiceEntry
from .typed import Path, Reader, each

JITTER_MOST, ALL = 50, 100
# Keys that only some types have; of the others every type has each.
_HTTP = ("http", "https")
_OF_TYPES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("path", "method", "status", "headers", "body"), _HTTP),
    "host": (*_HTTP, "grpc"),
    "tls": ("grpc",),
    **dict.fromkeys(("verify", "server_name"), ("https", "grpc")),
    "service": ("grpc",),
    **dict.fromkeys(("query", "query_type", "rcode", "answer"), ("dns",)),
    **dict.fromkeys(("send", "send_hex", "expect", "expect_hex"), ("udp",)),
    **dict.fromkeys(("argv", "user"), ("exec",)),
}
_DATAGRAMS = ("dns", "udp")
_PATH = re.compile(r"/[!\"$-~]*")
_HOST = re.compile(r"[0-9A-Za-z._:\[\]-]+")
_SERVER_NAME = re.compile(r"[0-9A-Za-z._:-]+")
# Types that are questions of their own (ANY, AXFR), or never stand in an answer.
_NO_QUERY = range(128, 256)

T = TypeVar("T")


def refuse(reader: Reader, path: Path, error: values.Refused) -> None:
    """Note a value that is not what is wanted."""
    reader.refuse(path, error.what, error.wants, error.fix)


def duration(reader: Reader, path: Path, value: float | str) -> float:
    """Seconds; the longest, with an error noted, for what is none."""
    name = ".".join(str(part) for part in path[-2:]) if "idle" in path else str(path[-1])
    return _checked(reader, path, lambda: values.duration(value, name), values.LONGEST_S)


def build_health(
    reader: Reader, path: Path, entry: ServiceEntry, ports: tuple[Port, ...], mode: Mode | None
) -> HealthCheck | None:
    """The check of a service, None for none; what is refused is noted as an error.

    A mode of None is one that is not known.
    """
    has_tcp = any(port.protocol is Protocol.TCP and port.port for port in ports)
    if entry.health == "none" or (entry.health is UNSET and not has_tcp):
        return None
    wanted = _wanted(entry.health)
    if reader.trusts((*path, "type")):
        _check_keys(reader, path, wanted)
    jitter = _share(reader, (*path, "jitter"), wanted.jitter, JITTER_MOST)
    interval = duration(reader, (*path, "interval"), wanted.interval)
    timeout = duration(reader, (*path, "timeout"), wanted.timeout)
    _check_times(reader, path, interval, timeout, jitter)
    port = wanted.port if isinstance(wanted.port, int) else None
    if wanted.via == "vip":
        _check_via(reader, (*path, "via"), wanted, mode)
    if port is None:
        _check_port(reader, path, wanted, ports)
    slow_start = 0.0
    if wanted.slow_start is not UNSET:
        slow_start = duration(reader, (*path, "slow_start"), wanted.slow_start)
    return HealthCheck(
        wanted.type,
        port,
        interval,
        timeout,
        wanted.rise,
        wanted.fall,
        jitter,
        slow_start,
        _share(reader, (*path, "panic_threshold"), wanted.panic_threshold, ALL),
        _how(reader, path, wanted),
        wanted.via,
    )


def _wanted(written: str | Health | UnsetType) -> Health:
    if isinstance(written, Health):
        return written
    return Health() if written is UNSET else Health(type=written)  # type: ignore[arg-type]


def _checked(reader: Reader, path: Path, check: Callable[[], T], otherwise: T) -> T:
    try:
        return check()
    except values.Refused as error:
        refuse(reader, path, error)
        return otherwise


def _share(reader: Reader, path: Path, text: str, most: int) -> float:
    return _checked(reader, path, lambda: values.share(text, str(path[-1]), most), 0.0)


def _check_keys(reader: Reader, path: Path, wanted: Health) -> None:
    """No key of another type."""
    for key in fields_of(Health):
        types = _OF_TYPES.get(key, (wanted.type,))
        if wanted.type not in types and reader.written((*path, key)):
            what = f"a check of type {wanted.type} has no {key}"
            why = f"{key} is for type {any_of(list(types))}"
            fix = f"remove it, or write type: {types[0]}"
            reader.error((*path, key), what, why, fix)


def _check_times(
    reader: Reader, path: Path, interval: float, timeout: float, jitter: float
) -> None:
    if not all(reader.trusts((*path, key)) for key in ("interval", "timeout", "jitter")):
        return
    longest = interval * (1 - jitter)
    # Shares are decimal, floats are not: half a percent is no longer timeout.
    if timeout <= longest * (1 + 1e-9):
        return
    where = reader.place((*path, "interval"))
    if timeout > interval:
        what = f"timeout {timeout:g} s is longer than the interval"
        why = f"a check begins every {interval:g} s ({where}) and must end before the next"
    else:
        what = f"timeout {timeout:g} s is longer than the interval less its jitter"
        why = f"the next check may begin {longest:g} s after a check ({where})"
    reader.error((*path, "timeout"), what, why, "shorten the timeout or lengthen the interval")


def _check_via(reader: Reader, path: Path, wanted: Health, mode: Mode | None) -> None:
    if wanted.type == "exec":
        why = "a program chooses by itself what it sends, and to whom"
        fix = "remove via, or write another type"
        reader.error(path, "a check of type exec goes by way of no VIP", why, fix)
    elif mode in {Mode.NAT, Mode.DSR_GENEVE}:
        why = f"in mode {mode} a backend has no VIP: clients' packets come for its own address"
        fix = "remove via: such a check goes to that address and port anyway"
        reader.error(path, f"in mode {mode} no check goes by way of the VIP", why, fix)


def _check_port(reader: Reader, path: Path, wanted: Health, ports: tuple[Port, ...]) -> None:
    """Whether a port follows from the service's."""
    if wanted.type == "exec":
        return
    needed = Protocol.UDP if wanted.type in _DATAGRAMS else Protocol.TCP
    # With ports refused it cannot be known whether one of them would do.
    unknown = not ports or not reader.trusts((*path[:-1], "ports"))
    if unknown or any(port.protocol is needed and port.port for port in ports):
        return
    verb = "connect to" if needed is Protocol.TCP else "ask"
    why = f"the service has no {needed.name} port of its own"
    fix = f"write health: {{type: {wanted.type}, port: PORT}}, or health: none"
    reader.error(path, f"health has no port to {verb}", why, fix)


def _how(reader: Reader, path: Path, wanted: Health) -> How:
    if wanted.type in _HTTP:
        return _http(reader, path, wanted)
    if wanted.type == "grpc":
        tls = _tls(reader, path, wanted) if wanted.tls == "on" else None
        return Grpc(_or(wanted.service), _host(reader, path, "host", wanted.host), tls)
    if wanted.type == "dns":
        return _dns(reader, path, wanted)
    if wanted.type == "udp":
        return _udp(reader, path, wanted)
    return _exec(reader, path, wanted) if wanted.type == "exec" else None


def _or(value: str | UnsetType, otherwise: str = "") -> str:
    return value if isinstance(value, str) else otherwise


def _http(reader: Reader, path: Path, wanted: Health) -> Http:
    if not _PATH.fullmatch(wanted.path):
        what = f"path {shown(wanted.path)} is not a path"
        fix = "write it as /health; other characters as %20"
        reader.refuse((*path, "path"), what, "a path that begins with /, in ASCII", fix)
    statuses = []
    for where, value in each((*path, "status"), wanted.status):
        found = _checked(reader, where, partial(values.status, value), None)
        statuses += [found] if found else []
    headers = []
    for where, text in each((*path, "headers"), wanted.headers):
        header = _checked(reader, where, partial(values.header, text), None)
        headers += [header] if header else []
    if wanted.method == "HEAD" and wanted.body is not UNSET:
        why, fix = "the answer to HEAD has none", "remove it, or write method: GET"
        reader.error((*path, "body"), "a body is expected of HEAD", why, fix)
    return Http(
        wanted.path,
        _host(reader, path, "host", wanted.host),
        wanted.method,
        tuple(statuses),
        tuple(headers),
        _or(wanted.body),
        _tls(reader, path, wanted) if wanted.type == "https" else None,
    )


def _host(reader: Reader, path: Path, key: str, value: str | UnsetType) -> str:
    if not isinstance(value, str):
        return ""
    form = _HOST if key == "host" else _SERVER_NAME
    if not form.fullmatch(value):
        what = f"{key} {shown(value)} is not a host name"
        reader.refuse((*path, key), what, "a host name", "write it as www.example.com")
    return value


def _tls(reader: Reader, path: Path, wanted: Health) -> Tls:
    return Tls(wanted.verify == "on", _host(reader, path, "server_name", wanted.server_name))


def _dns(reader: Reader, path: Path, wanted: Health) -> Dns:
    name, rdtype, rcode = _or(wanted.query), wanted.query_type.upper(), wanted.rcode.upper()
    if wanted.query is UNSET and reader.trusts((*path, "query")):
        _missing(reader, path, "query", "query: www.example.com")
    try:
        if name:
            name = dns.name.from_text(name).to_text()
    except (dns.exception.DNSException, UnicodeError):
        what = f"query {shown(name)} is not a domain name"
        reader.refuse((*path, "query"), what, "a domain name", "write it as www.example.com")
    try:
        number = dns.rdatatype.from_text(rdtype)
    except (dns.exception.DNSException, ValueError):
        number = None
    if number is None or number in _NO_QUERY:
        what = f"query_type {shown(wanted.query_type)} is not a type of record"
        fix = "write A, AAAA, SOA or another"
        reader.refuse((*path, "query_type"), what, "a type of record", fix)
        number = None
    try:
        dns.rcode.from_text(rcode)
    except (dns.exception.DNSException, ValueError):
        what = f"rcode {shown(wanted.rcode)} is not a response code"
        fix = "write NOERROR, NXDOMAIN or another"
        reader.refuse((*path, "rcode"), what, "a DNS response code", fix)
    answer = _or(wanted.answer)
    try:
        if answer and number is not None:
            answer = dns.rdata.from_text(
                dns.rdataclass.IN, number, answer, origin=dns.name.root, relativize=False
            ).to_text()
    except (dns.exception.DNSException, ValueError, UnicodeError) as error:
        what = f"answer {shown(answer)} is not the data of a record of type {rdtype}"
        wants = f"what a zone file has after the type ({error})"
        reader.refuse((*path, "answer"), what, wants, "correct the line")
    return Dns(name, rdtype, rcode, answer)


def _udp(reader: Reader, path: Path, wanted: Health) -> Udp:
    send = _bytes(reader, path, "send", wanted.send, wanted.send_hex)
    if wanted.send is UNSET and wanted.send_hex is UNSET:
        known = ((*path, "send"), (*path, "send_hex"))
        if all(reader.trusts(where) for where in known):
            _missing(reader, path, "send", "send: ping, or send_hex")
    return Udp(send, _bytes(reader, path, "expect", wanted.expect, wanted.expect_hex))


def _bytes(
    reader: Reader, path: Path, key: str, text: str | UnsetType, digits: str | UnsetType
) -> bytes:
    if isinstance(text, str) and isinstance(digits, str):
        why = f"{key} is text and {key}_hex is bytes, of the same datagram"
        reader.error((*path, f"{key}_hex"), f"{key} stands twice", why, "remove one of the two")
    if isinstance(digits, str):
        where = (*path, f"{key}_hex")
        return _checked(reader, where, lambda: values.hexadecimal(digits, f"{key}_hex"), b"")
    return _or(text).encode()


def _exec(reader: Reader, path: Path, wanted: Health) -> Exec:
    argv = tuple(text for _, text in each((*path, "argv"), wanted.argv))
    if wanted.argv is UNSET and reader.trusts((*path, "argv")):
        _missing(reader, path, "argv", 'argv: [/usr/local/bin/check, "{address}"]')
    elif argv and reader.trusts((*path, "argv")) and not argv[0].startswith("/"):
        what = f"argv begins with {shown(argv[0])}"
        wants = "a program's full path first; there is no shell that would look for it"
        reader.refuse((*path, "argv"), what, wants, "write it as /usr/local/bin/check")
    try:
        who = pwd.getpwnam(wanted.user)
    except (KeyError, ValueError):
        what = f"there is no user {shown(wanted.user)}"
        reader.refuse((*path, "user"), what, "a user of this host", "write the name of one")
    else:
        if who.pw_uid == 0:
            why = "a check runs without privileges"
            fix = "write another user, or remove the key: it is nobody then"
            reader.error((*path, "user"), f"user {shown(wanted.user)} is root", why, fix)
    return Exec(argv, wanted.user)


def _missing(reader: Reader, path: Path, key: str, example: str) -> None:
    where = "health"
    reader.refuse(path, f'{where} has no "{key}"', f"{key} for this type", f"add {example}")
