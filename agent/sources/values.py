# SPDX-License-Identifier: Apache-2.0
"""Text with a form of its own: addresses, networks, ports, backends, durations. Pure."""

import re
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from socket import AF_INET, inet_pton

from shunt.lb.model import ANY_PORT, Backend, IPAddress, IPNetwork, Port, Protocol

from .problems import shown

SHORTEST_S, LONGEST_S = 0.001, 30 * 86400.0
FEWEST_NAT_PORTS = 1024

_THIS_NETWORK = IPv4Network("0.0.0.0/8")
# First bytes that say enough: neither 0, loopback, link-local (169.254), multicast nor above.
_ORDINARY = frozenset(range(1, 224)) - {127, 169}
_BROADCAST = IPv4Address("255.255.255.255")
_UNIT_S = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION_FIX = "write it as 2s or 10m"
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)?")
_PORT = re.compile(r"([0-9]{1,9}|any)(?:/(tcp|udp|sctp))?")
_PORT_RANGE = re.compile(r"([0-9]{1,9})-([0-9]{1,9})")


class Refused(ValueError):
    """A value that is not what is wanted: `what` names it, `wants` and `fix` say what would be."""

    def __init__(self, what: str, wants: str, fix: str = "correct the line") -> None:
        super().__init__(what)
        self.what, self.wants, self.fix = what, wants, fix


def duration(value: float | str, name: str) -> float:
    """Seconds. Raises: Refused."""
    seconds = value
    if isinstance(value, str):
        match = _DURATION.fullmatch(value)
        if not match:
            wants = "seconds, or a number with ms, s, m, h or d"
            raise Refused(f"{name} {shown(value)} is not a duration", wants, _DURATION_FIX)
        seconds = float(match[1]) * _UNIT_S[match[2] or "s"]
    # Not a number is refused too: it compares as false.
    if not SHORTEST_S <= float(seconds) <= LONGEST_S:
        written = value if isinstance(value, str) else f"{value:g}"
        raise Refused(f"{name} {shown(written)} is out of range", "1ms to 30d", _DURATION_FIX)
    return float(seconds)


def address(text: str, name: str) -> IPAddress:
    """A single unicast address that other hosts can have. Raises: Refused."""
    try:
        found = _parse(text)
    except ValueError:
        wants = "an IPv4 or IPv6 address"
        raise Refused(f"{name} {shown(text)} is not an address", wants) from None
    return usable(found, name)


def _parse(text: str) -> IPAddress:
    """As `ip_address`, in a fifth of the time for IPv4. Raises: ValueError."""
    try:
        raw = inet_pton(AF_INET, text)
    except (OSError, ValueError):  # no IPv4, or with a NUL in it
        return ip_address(text)
    return IPv4Address(int.from_bytes(raw, "big"))


def usable(found: IPAddress, name: str) -> IPAddress:
    """The address itself, if other hosts can have it. Raises: Refused."""
    kind = ""
    if isinstance(found, IPv6Address):
        if found.scope_id is not None:
            fix = "use an address without %, not a link-local one"
            raise Refused(f"{name} {found} has a zone", "an address without a zone", fix)
        if found.ipv4_mapped is not None:
            # Python 3.13 writes the last four bytes with dots, 3.11 does not.
            what = f"{name} ::ffff:{found.ipv4_mapped} is an IPv4 address in IPv6 form"
            raise Refused(what, "a plain address", f"write {found.ipv4_mapped}")
    elif int(found) >> 24 in _ORDINARY:
        return found
    elif found in _THIS_NETWORK:
        kind = "unspecified"
    elif found == _BROADCAST:
        kind = "broadcast"
    for word in ("unspecified", "multicast", "loopback", "link-local"):
        if getattr(found, f"is_{word.replace('-', '_')}"):
            kind = word
    if kind:
        what = f"{name} {found} is {'an' if kind[0] == 'u' else 'a'} {kind} address"
        raise Refused(what, "a unicast address that other hosts can reach")
    return found


def _port_number(text: str, what: str) -> int:
    if not 1 <= int(text) <= 65535:
        raise Refused(what, "a port from 1 to 65535")
    return int(text)


def port(value: int | str) -> Port:
    """80, "80/tcp", "53/udp", "3868/sctp", "any", "any/udp". Raises: Refused."""
    match = _PORT.fullmatch(str(value))
    if not match:
        wants = "PORT, PORT/tcp, PORT/udp, PORT/sctp or any"
        raise Refused(f"port {shown(str(value))} is not a port", wants, "write 80 or 53/udp")
    number = ANY_PORT
    if match[1] != "any":
        number = _port_number(match[1], f"port {match[1]} is out of range")
    return Port(number, Protocol[(match[2] or "tcp").upper()])


def backend(text: str) -> Backend:
    """ADDRESS, ADDRESS:PORT or [IPV6]:PORT. Raises: Refused."""
    match = re.fullmatch(r"\[([^\]]*)\](?::([0-9]{1,9}))?|([^:]*):([0-9]{1,9})", text)
    host, digits = text, None
    if match:
        host = match[1] if match[3] is None else match[3]
        digits = match[2] or match[4]
    try:
        found = _parse(host)
    except ValueError:
        found = None
    if found is None or (match and (found.version == 6) != (match[3] is None)):
        wants = "HOST:PORT with an IPv4 or [IPv6] host"
        if digits is None:
            wants = "an address, or HOST:PORT with an IPv4 or [IPv6] host"
        raise Refused(f"backend {shown(text)} is not an address", wants)
    usable(found, "backend")
    number = _port_number(digits, f"backend {text} has port {digits}") if digits else 0
    return Backend(found, number)


def network4(text: str) -> IPv4Network:
    """An IPv4 network. Raises: Refused."""
    found = _network(text, "source4", "an IPv4 network such as 198.18.0.0/16")
    if not isinstance(found, IPv4Network):
        raise Refused(f"source4 {text} is an IPv6 network", "an IPv4 network")
    return found


def network6(text: str) -> IPv6Network:
    """An IPv6 network. Raises: Refused."""
    found = _network(text, "source6", "an IPv6 network such as 100::/64")
    if not isinstance(found, IPv6Network):
        raise Refused(f"source6 {text} is an IPv4 network", "an IPv6 network")
    return found


def pool_network(text: str) -> IPv4Network | IPv6Network:
    """A network of addresses that other hosts can have, or a single one. Raises: Refused."""
    found = _network(text, "pool network", "a network such as 203.0.113.0/28, or an address")
    for edge in (found.network_address, found.broadcast_address):
        # An IPv4 network's last address may be a VIP as any other; all ones is nobody's.
        usable(edge, "pool network's address")
    return found


def _network(text: str, name: str, wants: str) -> IPv4Network | IPv6Network:
    try:
        loose = ip_network(text, strict=False)
    except ValueError:
        raise Refused(f"{name} {shown(text)} is not a network", wants) from None
    try:
        found = ip_network(text)
    except ValueError:
        what = f"{name} {shown(text)} has bits set beyond its prefix"
        raise Refused(what, wants, f"write {loose}") from None
    if found.prefixlen < 8:
        raise Refused(f"{name} {found} is too large", "a prefix of /8 or longer")
    for word in ("unspecified", "multicast", "loopback"):
        if getattr(found.network_address, f"is_{word}"):
            raise Refused(f"{name} {found} is {word}", "a unicast network")
    return found


def any_network(text: str, name: str) -> IPNetwork:
    """An address, or a network; of any size. Raises: Refused."""
    wants = "an address, or a network such as 10.0.0.0/8"
    try:
        loose = ip_network(text, strict=False)
    except ValueError:
        raise Refused(f"{name} {shown(text)} is not a network", wants) from None
    if str(loose.network_address) != str(ip_address(text.partition("/")[0])):
        what = f"{name} {shown(text)} has bits set beyond its prefix"
        raise Refused(what, wants, f"write {loose}")
    return loose


def node_network(text: str) -> IPNetwork:
    """Of which addresses of this host are VIPs. Raises: Refused."""
    found = any_network(text, "node network")
    if found.is_multicast or (found.version == 6 and found.is_link_local):
        kind = "multicast" if found.is_multicast else "link-local"
        what = f"node network {found} is {kind}"
        raise Refused(what, "a network of addresses that name this host alone")
    return found


def port_range(text: str) -> tuple[int, int]:
    """FIRST-LAST, both included. Raises: Refused."""
    wants = f"FIRST-LAST with {FEWEST_NAT_PORTS} ports or more, such as 10000-29999"
    match = _PORT_RANGE.fullmatch(text)
    if not match:
        raise Refused(f"ports {shown(text)} is not a range", wants)
    first, last = (_port_number(part, f"ports {text} is out of range") for part in match.groups())
    if first > last:
        raise Refused(f"ports {text} ends before it begins", wants, f"write {last}-{first}")
    if last - first + 1 < FEWEST_NAT_PORTS:
        raise Refused(f"ports {text} has only {last - first + 1} ports", wants)
    return first, last


def listening(text: str) -> tuple[IPAddress, int] | None:
    """ADDRESS:PORT or [IPV6]:PORT of this host; None for off. Raises: Refused."""
    if text == "off":
        return None
    wants = "ADDRESS:PORT or [IPV6]:PORT, or off"
    match = re.fullmatch(r"(?:\[([^\]]*)\]|([^:\[\]]*)):([0-9]{1,9})", text)
    try:
        found = ip_address(match[1] or match[2]) if match else None
    except ValueError:
        found = None
    if match is None or found is None or (found.version == 6) != (match[1] is not None):
        what = f"listen {shown(text)} is not an address with a port"
        raise Refused(what, wants, "write 127.0.0.1:9961")
    return found, _port_number(match[3], f"listen {text} has port {match[3]}")


def share(text: str, name: str, most: int) -> float:
    """A share in percent, up to `most`. Raises: Refused."""
    match = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,3})?)%", text)
    if not match or float(match[1]) > most:
        what = f"{name} {shown(text)} is {'out of range' if match else 'not a share'}"
        raise Refused(what, f"a share from 0% to {most}%", f"write it as {min(10, most)}%")
    return float(match[1]) / 100


def status(value: int | str) -> tuple[int, int]:
    """200, "200-299". Raises: Refused."""
    match = re.fullmatch(r"([1-5][0-9]{2})(?:-([1-5][0-9]{2}))?", str(value))
    if not match or (match[2] and match[2] < match[1]):
        wants = "a status from 100 to 599, or FIRST-LAST"
        raise Refused(f"status {shown(str(value))} is not a status", wants, "write 200 or 200-299")
    return int(match[1]), int(match[2] or match[1])


def header(text: str) -> tuple[str, str]:
    """NAME: TEXT, or NAME alone for any value. Raises: Refused."""
    match = re.fullmatch(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+)(?::[ \t]*([\t -~]*))?", text)
    if not match:
        wants = "NAME: TEXT, TEXT being what the header's value contains"
        fix = "write it as 'Content-Type: text/html', in quotes"
        raise Refused(f"header {shown(text)} has no name", wants, fix)
    return match[1], match[2] or ""


def hexadecimal(text: str, name: str) -> bytes:
    """Bytes as hexadecimal digits. Raises: Refused."""
    try:
        return bytes.fromhex(text)
    except ValueError:
        fix = "write two digits a byte, such as 0a0b, in quotes"
        what = f"{name} {shown(text)} is not hexadecimal"
        raise Refused(what, "hexadecimal digits", fix) from None
