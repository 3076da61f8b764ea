# SPDX-License-Identifier: Apache-2.0
"""Asks an echo server (lab/echo.py) again and again, over one connected socket:

    asking.py udp|tcp ADDRESS PORT [--until NAME] [--from ADDRESS:PORT]

Prints the socket's port, then who answers; an error by its name, after which the same socket of UDP
is connected again. It needs Python alone, so it runs on a machine that has nothing else.
"""

from __future__ import annotations

import argparse
import errno
import socket
import time

KINDS = {"udp": socket.SOCK_DGRAM, "tcp": socket.SOCK_STREAM}


def connected(arguments: argparse.Namespace) -> tuple[socket.socket, str]:
    """To the server that was asked for, if one was; and who it is."""
    while True:
        sock = socket.socket(socket.AF_INET, KINDS[arguments.kind])
        sock.settimeout(10)
        if arguments.source:
            address, _, port = arguments.source.partition(":")
            sock.bind((address, int(port)))
        sock.connect((arguments.address, arguments.port))
        name = ask(sock)
        if arguments.until in (None, name):
            return sock, name
        sock.close()


def ask(sock: socket.socket) -> str:
    sock.sendall(b"hello\n")
    return sock.recv(1000).split()[0].decode()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("--until")
    parser.add_argument("--from", dest="source")
    arguments = parser.parse_args()
    sock, name = connected(arguments)
    print(sock.getsockname()[1], name, sep="\n", flush=True)
    while True:
        time.sleep(0.1)
        try:
            said = ask(sock)
        except OSError as e:
            said = errno.errorcode.get(e.errno or 0, str(e))
            if arguments.kind == "udp":
                sock.connect((arguments.address, arguments.port))
        print(said, flush=True)


if __name__ == "__main__":
    main()
