# SPDX-License-Identifier: Apache-2.0
"""One side of many connections that talk at random, and compare every byte that they get.

    python stream_talk.py serve ADDRESS PORT CONNECTIONS MESSAGES SEED
    python stream_talk.py dial  ADDRESS PORT CONNECTIONS MESSAGES SEED

Each side of connection n sends MESSAGES messages of mixed sizes, whose bytes follow from n and the
side; then it closes its direction. Whoever gets something answers with one message, or now and then
with many at once, or reads nothing for a while. Prints what it sent.
"""

from __future__ import annotations

import random
import select
import socket
import sys
import time

SECRET = random.Random(20).randbytes(1 << 20)
SIZES = (*(1, 2, 64) * 3, *(200, 1000, 4096) * 2, 9000, 30000)
# Of every second connection: those stay redirected, the others do not.
BURSTS = ((1, 1, 1, 1, 2), (*(1,) * 12, 3, 3, 100))


class End:
    """One end of a connection."""

    def __init__(self, sock: socket.socket, n: int, side: int, messages: int, seed: int) -> None:
        self.sock, self.left = sock, messages
        self.random = random.Random(f"{seed}/{n}/{side}")
        self.pending = b""
        self.bursts = BURSTS[n % 2]
        self.due = 0  # messages to be sent
        self.sent = self.got = 0
        self.out = n * 7919 + side * 104729  # where in SECRET it begins
        self.into = n * 7919 + (1 - side) * 104729
        self.closed = self.ended = False
        self.asleep_until = 0.0

    def read(self) -> None:
        """What is there; the next bytes of the other end's, or nothing is as it should be."""
        while True:
            try:
                data = self.sock.recv(self.random.choice((50, 1000, 65536)))
            except BlockingIOError:
                return
            if not data:
                self.ended, self.due = True, self.left
                return
            assert data == piece(self.into + self.got, len(data)), f"after {self.got} bytes"
            self.got += len(data)
            self.due = min(self.left, self.due + self.random.choice(self.bursts))
            if self.random.random() < 0.002:
                self.asleep_until = time.monotonic() + 0.05
                return

    def write(self) -> None:
        while self.pending or self.due:
            if not self.pending:
                size = self.random.choice(SIZES)
                self.pending = piece(self.out + self.sent, size)
                self.sent += size
                self.due, self.left = self.due - 1, self.left - 1
            try:
                taken = self.sock.send(self.pending)
            except BlockingIOError:
                return
            self.pending = self.pending[taken:]
        if not self.left and not self.closed:
            self.sock.shutdown(socket.SHUT_WR)
            self.closed = True


def piece(at: int, size: int) -> bytes:
    at %= len(SECRET)
    found = SECRET[at : at + size]
    return found if len(found) == size else found + SECRET[: size - len(found)]


def talk(ends: list[End]) -> None:
    poller = select.epoll()
    by_fd = {end.sock.fileno(): end for end in ends}
    waiting: set[int] = set()
    for fd in by_fd:
        poller.register(fd, select.EPOLLIN)
    last = time.monotonic()
    while by_fd:
        for fd, _ in poller.poll(0.02, 256):
            end = by_fd[fd]
            last = time.monotonic()
            if end.asleep_until <= last:
                end.read()
            end.write()
            if end.ended and end.closed:
                poller.unregister(fd)
                end.sock.close()
                del by_fd[fd]
                waiting.discard(fd)
            elif bool(end.pending) is not (fd in waiting):
                waiting ^= {fd}
                more = select.EPOLLOUT if end.pending else 0
                poller.modify(fd, (0 if end.ended else select.EPOLLIN) | more)
        assert time.monotonic() - last < 30, f"{len(by_fd)} connections are silent"


def main(role: str, address: str, port: int, connections: int, messages: int, seed: int) -> None:
    side = role == "dial"
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    socks = {}
    if side:
        for n in range(connections):
            sock = socket.socket(family)
            sock.connect((address, port))
            sock.sendall(n.to_bytes(4, "big"))
            socks[n] = sock
    else:
        with socket.create_server((address, port), family=family, backlog=connections) as listener:
            print("listening", flush=True)
            for _ in range(connections):
                sock = listener.accept()[0]
                socks[int.from_bytes(sock.recv(4), "big")] = sock
    ends = [End(sock, n, int(side), messages, seed) for n, sock in socks.items()]
    for end in ends:
        end.sock.setblocking(False)
        if side:
            end.due = 1
            end.write()
    talk(ends)
    print(sum(end.sent for end in ends), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
