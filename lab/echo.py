# SPDX-License-Identifier: Apache-2.0
"""A backend's echo server for UDP and TCP: `python -m shunt.lab.echo NAME PORT`.

Every line (TCP) or datagram (UDP) is answered with `NAME PEER LINE`: who answers, whom it saw as
the peer (with nat: the load balancer that carried the flow), and what was sent.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys

MAX_DATAGRAM = 65535


def udp_socket(port: int) -> socket.socket:
    """Bound to every address of both families, and told which one a datagram was sent to."""
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    sock.setblocking(False)
    sock.bind(("::", port))
    return sock


def answer_datagrams(sock: socket.socket, name: str) -> None:
    """Answer what has arrived, from the address it was sent to.

    Without that, the kernel would answer from the host's own address, not from the VIP, and the
    client would not recognise it.
    """
    while True:
        try:
            data, ancillary, _, peer = sock.recvmsg(MAX_DATAGRAM, socket.CMSG_SPACE(20))
        except BlockingIOError:
            return
        except OSError:
            continue  # an ICMP error about an earlier answer
        local = [
            # Address and interface; the interface is left to the routing table.
            (level, kind, value[:16] + bytes(4))
            for level, kind, value in ancillary
            if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO)
        ]
        try:
            sock.sendmsg([f"{name} {address_of(peer)} ".encode() + data], local, 0, peer)
        except OSError as error:
            print(f"no answer to {peer}: {error}", file=sys.stderr, flush=True)


def address_of(peer: tuple[str, int]) -> str:
    return peer[0].removeprefix("::ffff:")


async def answer_lines(
    name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    prefix = f"{name} {address_of(writer.get_extra_info('peername'))} ".encode()
    try:
        while line := await reader.readline():
            writer.write(prefix + line)
            await writer.drain()
    except (OSError, ValueError):
        pass  # reset by the peer, or a line beyond all measure
    finally:
        writer.close()


async def serve(name: str, port: int) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with udp_socket(port) as datagrams:
        loop.add_reader(datagrams, answer_datagrams, datagrams, name)
        server = await asyncio.start_server(
            lambda r, w: answer_lines(name, r, w), host=["0.0.0.0", "::"], port=port, backlog=1024
        )
        print(f"{name} answers on port {port}", flush=True)
        await stop.wait()
        loop.remove_reader(datagrams)
        server.close()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
