# SPDX-License-Identifier: Apache-2.0
"""Services and backends by the names people give them."""

from bisect import bisect_left

from shunt.lb.compile import Endpoint
from shunt.lb.errors import ShuntError
from shunt.lb.model import Configuration, Service

SHOWN = 100  # more names help nobody


def find_service(configuration: Configuration, name: str) -> Service:
    """Raises: ShuntError that names what there is."""
    services = configuration.services  # sorted by name
    at = bisect_left(services, name, key=lambda service: service.name)
    if at < len(services) and services[at].name == name:
        return services[at]
    names = ", ".join(s.name for s in services[:SHOWN]) or "none"
    if len(services) > SHOWN:
        names += f" and {len(services) - SHOWN} more"
    raise ShuntError(f"no service {name}", f"there are: {names}", "see `shunt service list`")


def find_backend(configuration: Configuration, service: str, backend: str) -> Endpoint:
    """A configured backend, as `backend list` shows it, or by its address alone.

    Raises: ShuntError that names what there is, or says that the address alone is not enough.
    """
    configured = find_service(configuration, service).backends
    endpoints = [Endpoint(b.address, b.port) for b in configured]
    exact = [e for e in endpoints if str(e) == backend]
    found = exact or [e for e in endpoints if str(e.address) == backend]
    if len(found) == 1:
        return found[0]
    names = ", ".join(str(e) for e in endpoints) or "none"
    if len(found) > 1:
        raise ShuntError(
            f"service {service} has several backends at {backend}",
            f"it has: {names}",
            "give the port too",
        )
    raise ShuntError(
        f"service {service} has no backend {backend}",
        f"it has: {names}",
        f"see `shunt backend list {service}`",
    )
