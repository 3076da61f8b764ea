# SPDX-License-Identifier: Apache-2.0
"""`masquerade:` of shunt.yaml."""

from ipaddress import ip_network

from msgspec import UNSET

from shunt.lb.model import IPNetwork, Masquerade

from . import values
from .shape import Masquerading, SettingsFile
from .typed import Path, Reader, each

# Private use (RFC 1918, RFC 4193), shared by a carrier's customers (RFC 6598), and one link alone.
NOT_TO = tuple(
    ip_network(text)
    for text in (
        *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16"),
        *("fc00::/7", "fe80::/10"),
    )
)
# The kernel's map has room for as many.
MOST_NETWORKS = 1000


def build_masquerade(
    reader: Reader, written: SettingsFile, interfaces: tuple[str, ...]
) -> Masquerade | None:
    """None for off; what is refused is noted as an error and left out."""
    entry, path = written.masquerade, ("masquerade",)
    if not isinstance(entry, Masquerading):
        return None
    devices = []
    for where, name in each((*path, "interfaces"), entry.interfaces):
        if name not in interfaces and reader.trusts(("interfaces",)):
            what = f"interface {name} is not among this node's interfaces"
            why = f"its programs do it, and they are on {', '.join(interfaces) or 'none'}"
            reader.error(where, what, why, "add it to interfaces, or remove it here")
        devices.append(name)
    sources = _networks(reader, (*path, "sources"), entry.sources)
    not_to = NOT_TO
    if entry.not_to is not UNSET:
        not_to = _networks(reader, (*path, "not_to"), entry.not_to)
        if not sources and reader.trusts((*path, "sources")):
            what, why = "not_to without sources", "it says whereto those are not masqueraded"
            reader.error((*path, "not_to"), what, why, "remove it, or write sources")
    for key, networks in (("sources", sources), ("not_to", not_to)):
        if len(networks) > MOST_NETWORKS // 2:
            what = f"{key} has {len(networks)} networks"
            fix = "write fewer, larger ones"
            reader.error((*path, key), what, f"{MOST_NETWORKS // 2} fit", fix)
    return Masquerade(tuple(dict.fromkeys(devices)), sources, not_to)


def _networks(reader: Reader, path: Path, entry: object) -> tuple[IPNetwork, ...]:
    found: dict[IPNetwork, None] = {}
    for where, text in each(path, entry):
        try:
            found[values.any_network(text, path[-1])] = None  # type: ignore[arg-type]
        except values.Refused as error:
            reader.refuse(where, error.what, error.wants, error.fix)
    return tuple(found)
