# SPDX-License-Identifier: Apache-2.0
"""What is asked of a backend, by type of check, and what counts as an answer. Pure.

A check of type tcp asks nothing: it is well when the connection is accepted, and has no class.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tls:
    """How a connection is encrypted. Server name "": the Host header's, else the address."""

    verify: bool = True
    server_name: str = ""


@dataclass(frozen=True, slots=True)
class Http:
    """One request; the answer must have a status in `statuses`, all headers, and `body`."""

    path: str = "/"
    host: str = ""
    method: str = "GET"
    statuses: tuple[tuple[int, int], ...] = ((200, 399),)
    headers: tuple[tuple[str, str], ...] = ()  # a name, and what its value contains
    body: str = ""  # what the first BODY_MAX bytes contain
    tls: Tls | None = None

    def judge(self, status: int, headers: dict[str, str], body: str) -> str:
        """Why the answer is not the expected one; "" if it is. Names of headers in lower case."""
        if not any(first <= status <= last for first, last in self.statuses):
            return f"status {status}, expected {spans(self.statuses)}"
        for name, wanted in self.headers:
            found = headers.get(name.lower())
            if found is None:
                return f"the answer has no header {name}"
            if wanted not in found:
                return f"header {name} does not contain {wanted!r}"
        if self.body and self.body not in body:
            return f"the body does not contain {self.body!r}"
        return ""


# So much of a body is read.
BODY_MAX = 65536


@dataclass(frozen=True, slots=True)
class Grpc:
    """grpc.health.v1 Health/Check; service "" is the whole server."""

    service: str = ""
    authority: str = ""
    tls: Tls | None = None


@dataclass(frozen=True, slots=True)
class Dns:
    """A query over UDP; `answer` is the text of a record's data, as in a zone file."""

    name: str
    rdtype: str = "A"
    rcode: str = "NOERROR"
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Udp:
    """A datagram; the answer must contain `expect`, and any will do if that is empty."""

    send: bytes
    expect: bytes = b""


@dataclass(frozen=True, slots=True)
class Exec:
    """A program, never by way of a shell; exit code 0 is well.

    {address} and {port} in an argument stand for the backend's.
    """

    argv: tuple[str, ...]
    user: str = "nobody"

    def command(self, address: str, port: int) -> list[str]:
        """The arguments for one backend."""
        words = {"{address}": address, "{port}": str(port)}
        found = list(self.argv)
        for word, value in words.items():
            found = [part.replace(word, value) for part in found]
        return found


How = Http | Grpc | Dns | Udp | Exec | None


def spans(statuses: tuple[tuple[int, int], ...]) -> str:
    """Ranges as they are written: 200-299, 404."""
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in statuses)
