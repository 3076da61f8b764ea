# SPDX-License-Identifier: Apache-2.0
"""Random and mutated packets through the real program: `make fuzz-packets`.

Frames of every kind that the program knows are sent whole, cut, lengthened, with bits turned and
fields exchanged, to services of every mode, family and option. Of each packet must be true:

- it leaves by one counted reason, and the verdict is of the reason's class;
- what is sent goes to the MAC of a configured backend, or back to where the frame came from; and
  by its outermost header to a backend's address, to the sender, or to a client whose flow is known;
- now and then: no line of map flows is stuck, and the table does not contradict itself.

A frame that is the first to come to a reason is kept in corpus/ (`--keep`), from which mutations
start; tests/packets/test_fuzz.py sends the corpus and a few thousand more.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from ipaddress import ip_address
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np

from shunt.agent.quic import PutServerId, ServerIds
from shunt.kern.libbpf import XDP_DROP, XDP_PASS, XDP_TX
from shunt.kern.testrun import Runs
from shunt.lb.model import Quic, RateLimit
from shunt.policy.sources import compile_rules
from tests.fuzz import seeds
from tests.packets.balancer import BACKEND_MAC, TCP, UDP, Balancer, Reason, mac
from tests.packets.test_flow_table import wrong

CORPUS = Path(__file__).parent / "corpus"
XDP_REDIRECT = 4
CLASSES = {"PASS": {XDP_PASS}, "SENT": {XDP_TX, XDP_REDIRECT}, "DROP": {XDP_DROP}}
BLOCK = 50  # packets whose counters are looked at together
CHECK_EVERY = 200_000
REPLIES = 200  # of backends, to what was translated last
LONGEST = 1500
# By ethertype: where the source address stands, and this host's own.
OWN = {
    b"\x08\x00": (26, ip_address(seeds.OWN[4]).packed),
    b"\x86\xdd": (22, ip_address(seeds.OWN[6]).packed),
}
BACKEND = mac(BACKEND_MAC).tobytes()


class Broken(AssertionError):
    """A packet was treated as none may be; the frame is in the message."""


class Target:
    """A balancer that serves everything at once, and what may leave it."""

    def __init__(self) -> None:
        self.lb = Balancer(
            {"slots": 1 << 13, "restarts": 1 << 10, "flows": 1 << 12, "rates": 64}
            | dict.fromkeys(("nat_fwd", "nat_rev"), 1 << 12),
            inserts_per_s=1 << 30,
            answers_per_s=1 << 30,
            samples_per_s=4,
        )
        self.runs = Runs(self.lb.object.programs["shunt_lb"].fd, LONGEST)
        self.addresses: set[bytes] = set()
        self.clients: set[tuple[bytes, bytes]] = set()  # MAC and address of who wanted to be served
        ids = ServerIds(self.lb.map("server_ids"))
        for version, vip, mode, proto, state in seeds.services():
            backends = seeds.BACKENDS[version]
            service = self.lb.add_service(vip, seeds.PORT, proto, mode, backends)
            self.addresses |= {ip_address(a).packed for a in backends}
            if state == "moving":
                service.move()
            elif state == "empty":
                service.set_slots(0)
            elif state == "asks":
                service.ask(
                    affinity_ns=10**11,
                    hash_client=True,
                    rate=RateLimit(1000, 1000) if proto == TCP else None,
                    sources=compile_rules([], seeds.DENIED),
                    quic=Quic(seeds.SERVER_ID_BYTES) if proto == UDP else None,
                )
                for server, backend in zip(seeds.SERVER_IDS, service.backends, strict=True):
                    if proto == UDP:
                        ids.put(PutServerId(service.id, server, backend))
        self.lb.add_service(seeds.ANY_PORT_VIP, 0, UDP, backends=seeds.BACKENDS[4])
        self.classes = np.array([n[:4] for n in Reason.__members__ if n != "COUNT"])
        self.counters: Any = self.lb.map("reasons")
        self.before = self._counts()

    def close(self) -> None:
        self.lb.close()

    def _counts(self) -> Any:
        return self.counters.totals()["packets"].astype(np.int64)

    def send(self, frames: list[bytes]) -> tuple[set[int], list[bytes]]:
        """Packets, checked. Shape: (reasons they came to, what was sent).

        Raises: Broken.
        """
        verdicts, left = Counter[int](), []
        for frame in frames:
            verdict = self.runs.run(frame)
            verdicts[verdict] += 1
            if verdict != XDP_PASS:  # also of one that was dropped the way is learnt
                self.clients.add((frame[6:12], outer_source(frame)))
            if verdict in CLASSES["SENT"]:
                left.append(sent := self.runs.data)
                if said := self._astray(frame, sent):
                    raise Broken(f"{said}: {frame.hex()} became {sent.hex()}")
        now = self._counts()
        change, self.before = now - self.before, now
        for name, kinds in CLASSES.items():
            counted = int(change[self.classes == name].sum())
            were = sum(verdicts.pop(verdict, 0) for verdict in kinds)
            if counted != were:
                what = f"{counted} reasons {name}_ were counted for {were} packets"
                raise Broken(f"{what}: {' '.join(f.hex() for f in frames)}")
        if verdicts:
            raise Broken(f"verdicts {dict(verdicts)}: {' '.join(f.hex() for f in frames)}")
        return set(np.flatnonzero(change).tolist()), left

    def _astray(self, frame: bytes, sent: bytes) -> str:
        """Why this may not leave; empty if it may."""
        to, destination = sent[:6], outer_destination(sent)
        # Back to its sender; a translated reply, to where a packet of its client came from.
        if (to, destination) in self.clients:
            return ""
        if to == BACKEND:
            unchanged = outer_destination(frame) == destination  # dsr-l2
            return "" if unchanged or destination in self.addresses else "to no backend"
        return "to no client"

    def check_tables(self) -> None:
        """Raises: Broken if the table of flows contradicts itself."""
        if found := wrong(self.lb.map("flows").mapped()):
            raise Broken("; ".join(found[:5]))


def outer_destination(frame: bytes) -> bytes:
    """Of the outermost IP header; empty if there is none."""
    at = _network(frame)
    if frame[at - 2 : at] == b"\x08\x00":
        return frame[at + 16 : at + 20]
    return frame[at + 24 : at + 40] if frame[at - 2 : at] == b"\x86\xdd" else b""


def outer_source(frame: bytes) -> bytes:
    """The same."""
    at = _network(frame)
    if frame[at - 2 : at] == b"\x08\x00":
        return frame[at + 12 : at + 16]
    return frame[at + 8 : at + 24] if frame[at - 2 : at] == b"\x86\xdd" else b""


def _network(frame: bytes) -> int:
    at = 14
    while frame[at - 2 : at] in {b"\x81\x00", b"\x88\xa8"} and at < 30:
        at += 4
    return at


def mutations(rnd: random.Random, corpus: list[bytes]) -> Iterator[bytes]:
    """Frames without end: whole ones of the corpus, and what becomes of them."""
    while True:
        frame = bytearray(rnd.choice(corpus))
        for _ in range(rnd.choice((0, 1, 1, 1, 2, 4))):
            mutate(rnd, frame, corpus)
        yield bytes(frame[:LONGEST]).ljust(14, b"\0")


def mutate(rnd: random.Random, frame: bytearray, corpus: list[bytes]) -> None:
    """Change one thing."""
    kind, size = rnd.randrange(9), len(frame)
    at = rnd.randrange(size) if size else 0
    if kind == 0:
        frame[at : at + 1] = bytes((frame[at] ^ 1 << rnd.randrange(8),)) if size else b""
    elif kind == 1:
        frame[at : at + 1] = bytes((rnd.choice((0, 1, 4, 5, 6, 17, 43, 44, 58, 60, 64, 127, 255)),))
    elif kind == 2:
        del frame[max(14, at) :]
    elif kind == 3:
        frame += rnd.randbytes(rnd.randrange(1, 64))
    elif kind == 4:
        frame[at : at + 2] = rnd.choice((b"\0\0", b"\xff\xff", b"\x20\0", b"\0\1", b"\0\x14"))
    elif kind == 5:  # the head of one, the tail of another
        other = rnd.choice(corpus)
        frame[at:] = other[at:]
    elif kind == 6:  # bytes taken out in the middle
        del frame[at : at + rnd.randrange(1, 9)]
    elif kind == 7:  # or put in
        frame[at:at] = rnd.randbytes(rnd.randrange(1, 9))
    else:  # the fields that look-ups go by
        where = rnd.choice((12, 14, 16, 20, 23, 26, 30, 34, 36, 47, 54, 56))
        frame[where : where + 2] = rnd.randbytes(2)


def corpus_frames() -> list[bytes]:
    """What was kept, and frames of every kind."""
    kept = [path.read_bytes() for path in sorted(CORPUS.glob("*.bin"))]
    return kept + [bytes(frame) for frame in seeds.frames()]


def fuzz(seed: int, packets: int, keep: bool) -> dict[str, int]:
    """So many packets; how often they came to each reason.

    Raises: Broken.
    """
    rnd = random.Random(seed)
    target, corpus = Target(), corpus_frames()
    frames, seen = mutations(rnd, corpus), set[int]()
    started, whole = time.monotonic(), len(corpus)
    try:
        for sent in range(0, packets, BLOCK):
            block = list(islice(frames, min(BLOCK, packets - sent)))
            reasons, left = target.send(block)
            if reasons - seen:
                for frame in block:  # sent again it does the same, or almost
                    found = target.send([frame])[0]
                    if keep and not found <= seen:
                        _keep(frame, found)
                    corpus.extend([frame] * (not found <= seen))
                    seen |= found
                seen |= reasons
            for reply in filter(None, (reply_to(frame) for frame in left)):
                if len(corpus) < whole + REPLIES:
                    corpus.append(reply)
                else:
                    corpus[rnd.randrange(whole, len(corpus))] = reply
            if sent % (20 * BLOCK) == 0:
                target.lb.advance(rnd.choice((0.001, 0.1, 1, 61)))
            if sent % CHECK_EVERY == 0:
                target.check_tables()
                _say(f"{sent:,} packets, {sent / (time.monotonic() - started):,.0f} a second")
        target.check_tables()
        return {Reason(i).name: int(c) for i, c in enumerate(target.before) if c}
    finally:
        target.close()


def reply_to(sent: bytes) -> bytes | None:
    """A backend's answer to a translated TCP or UDP packet; None for others."""
    at, own = OWN.get(sent[12:14], (0, b""))
    size = len(own)
    if not own or sent[at : at + size] != own:
        return None
    ports = at + 2 * size
    turned = sent[at + size : ports] + sent[at : at + size] + sent[ports + 2 : ports + 4]
    macs = sent[6:12] + sent[:6]
    return macs + sent[12:at] + turned + sent[ports : ports + 2] + sent[ports + 4 :]


def _keep(frame: bytes, reasons: set[int]) -> None:
    CORPUS.mkdir(exist_ok=True)
    for reason in reasons:
        name = Reason(reason).name.lower()
        if not any(CORPUS.glob(f"{name}-*.bin")):
            tail = hashlib.sha256(frame).hexdigest()[:8]
            (CORPUS / f"{name}-{tail}.bin").write_bytes(frame)


def _say(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--packets", default=10_000_000, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=None, type=int, help="to repeat a run; at random if not given")
@click.option("--keep/--no-keep", default=False, help="write new kinds of frames to corpus/")
def main(packets: int, seed: int | None, keep: bool) -> None:
    """Fuzz on every processor, and say what the packets came to."""
    first = seed if seed is not None else int.from_bytes(os.urandom(4), "little")
    cpus = sorted(os.sched_getaffinity(0))
    print(f"seed {first}, {packets:,} packets on {len(cpus)} processors", flush=True)
    share = -(-packets // len(cpus))
    total: dict[str, int] = {}
    with ProcessPoolExecutor(len(cpus)) as pool:
        running = [pool.submit(fuzz, first + n, share, keep) for n in range(len(cpus))]
        for each in running:
            for name, count in each.result().items():
                total[name] = total.get(name, 0) + count
    for name, count in sorted(total.items()):
        print(f"{count:>12,}  {name}")
    print(f"{sum(total.values()):,} packets, each left by one counted reason")


if __name__ == "__main__":
    main()
