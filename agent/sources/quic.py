# SPDX-License-Identifier: Apache-2.0
"""A service's QUIC connection ids, and the servers that its backends are in them."""

from msgspec import UNSET

from shunt.lb.model import Backend, Port, Protocol, Quic

from . import values
from .shape import BackendEntry, ConnectionIds, ServiceEntry
from .typed import Path, Reader

MOST_ID_BYTES = 20 - 1  # in version 1 (RFC 9000); the first octet is neither server id nor nonce


def connection_ids(
    reader: Reader, path: Path, entry: ServiceEntry, ports: tuple[Port, ...]
) -> Quic | None:
    """How they are made, if that is said."""
    asked, path = entry.quic, (*path, "quic")
    if not isinstance(asked, ConnectionIds):
        return None
    if ports and not any(port.protocol is Protocol.UDP for port in ports):
        why = "QUIC is UDP, and the service has no UDP port"
        reader.error(path, "quic routes nothing", why, "add a port such as 443/udp, or remove it")
    if asked.server_id_length is UNSET:
        return None
    both = asked.server_id_length + asked.nonce_length
    if both > MOST_ID_BYTES:
        what = f"server id and nonce have {both} octets"
        why = f"a QUIC connection id has room for {MOST_ID_BYTES}, after its first octet"
        reader.error(path, what, why, "lower server_id_length or nonce_length")
    return Quic(asked.server_id_length, asked.config_id, asked.nonce_length)


def server_id(reader: Reader, path: Path, entry: BackendEntry) -> bytes:
    """Of a backend; empty if it has none."""
    if entry.server_id is UNSET:
        return b""
    try:
        return values.hexadecimal(entry.server_id, "server_id")
    except values.Refused as error:
        reader.refuse((*path, "server_id"), error.what, error.wants, error.fix)
        return b""


def check_server_ids(
    reader: Reader, path: Path, asked: Quic | None, backends: dict[Path, Backend]
) -> None:
    """Whether each backend has one that fits, and its own; none where they would mean nothing."""
    if not reader.trusts((*path, "quic")):
        return
    first: dict[bytes, Path] = {}
    for where, backend in backends.items():
        key, found = (*where, "server_id"), backend.server_id
        if asked is None:
            if found:
                why = "the service has no quic, so no packet is routed by it"
                fix = "remove it, or add quic to the service"
                reader.error(key, f"backend {backend} has a server_id", why, fix)
        elif not found:
            if reader.trusts(key):
                why = "the service routes QUIC by connection id, and none would lead there"
                fix = f'write {{address: {backend.address}, server_id: "{_example(asked)}"}}'
                reader.error(where, f"backend {backend} has no server_id", why, fix)
        elif len(found) != asked.server_id_length:
            what = f"server_id {found.hex()} has {len(found)} octets"
            why = f"quic.server_id_length is {asked.server_id_length}"
            reader.error(key, what, why, f"write it as {_example(asked)}, in quotes")
        elif found in first:
            what = f"server_id {found.hex()} stands twice"
            why = f"this service has it already at {reader.place(first[found])}"
            reader.error(key, what, why, "give each backend one of its own")
        else:
            first[found] = key


def _example(asked: Quic) -> str:
    return (1).to_bytes(asked.server_id_length, "big").hex()
