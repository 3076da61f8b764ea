# SPDX-License-Identifier: Apache-2.0
"""Random and mutated packets through the real programs: `make fuzz-packets`.

Frames of every kind that the programs know are sent whole, cut, lengthened, with bits turned and
fields exchanged, to services of every mode, family and option: through the balancer, through TC on
the way in and out, and through what a backend's node has (decap, and its answers). What has been
translated is answered. What must be true of each packet stands in target.py; now and then, and
after the agent's scan, no line of map flows is stuck, and no entry of map nat_fwd or nat_rev is
without its other half.

`--keep` writes the packets that come to a reason to corpus/ (kept.py), from which mutations start,
too; tests/packets/test_fuzz.py sends those, and some thousand more.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice

import click

from tests.fuzz import kept
from tests.fuzz.balancer_target import BalancerTarget
from tests.fuzz.decap_target import DecapTarget
from tests.fuzz.headers import error_about, reply_to
from tests.fuzz.mutations import mutations
from tests.fuzz.target import Broken, Step, Target
from tests.fuzz.translator_target import TranslatorTarget

# By name: also of the folder in corpus/.
TARGETS: dict[str, Callable[..., Target]] = {
    "lb": BalancerTarget,
    "tc": TranslatorTarget,
    "decap": DecapTarget,
}
BLOCK = 50  # packets whose counters are looked at together
CHECK_EVERY = 200_000
REPLIES = 200  # to what was translated last
HISTORY = 1000  # packets that what is kept may need


class Run:
    """Packets to one target, the same for the same seed."""

    def __init__(self, name: str, target: Target, seed: int) -> None:
        self.name, self.target, self.rnd = name, target, random.Random(seed)
        self.corpus = [*target.seeds(), *kept.load_all(name, target.hooks)]
        self.whole = len(self.corpus)
        self.seen: set[int] = set()
        self.replies: list[Step] = []  # to what was sent last
        self.frames = map(target.runnable, mutations(self.rnd, self.corpus, len(target.hooks)))

    def whole_ones(self) -> Iterator[Step]:
        """All that mutations start from, each followed by what is said to it.

        Raises: Broken, from `send`.
        """
        for step in self.corpus[: self.whole]:
            yield step
            for reply in self.replies:
                yield reply
                yield from self.replies[:1]

    def send(self, steps: list[Step]) -> set[int]:
        """Some packets; what they came to. The replies join what mutations start from.

        Raises: Broken.
        """
        target, rnd, corpus = self.target, self.rnd, self.corpus
        reasons, left = target.send(steps)
        self.replies = [
            target.runnable((target.back(hook, what), reply))
            for hook, what, frame in left
            for reply in (reply_to(frame), error_about(frame))
            if reply is not None
        ]
        for step in self.replies:
            if len(corpus) < self.whole + REPLIES:
                corpus.append(step)
            else:
                corpus[rnd.randrange(self.whole, len(corpus))] = step
        return reasons

    def learn(self, block: list[Step]) -> None:
        """A frame that is the first to come to a reason joins, too: sent again it does so, or
        almost."""
        for step in block:
            found = self.target.send([step])[0]
            if not found <= self.seen:
                self.corpus.insert(0, step)
                self.whole += 1
            self.seen |= found

    def go(self, packets: int) -> None:
        """So many at random.

        Raises: Broken.
        """
        target, started = self.target, time.monotonic()
        for step in self.whole_ones():
            self.seen |= self.send([step])
        for sent in range(0, packets, BLOCK):
            block = list(islice(self.frames, min(BLOCK, packets - sent)))
            reasons = self.send(block)
            if reasons - self.seen:
                self.learn(block)
                self.seen |= reasons
            if sent % (20 * BLOCK) == 0:
                target.advance(self.rnd)
            if sent % CHECK_EVERY == 0:
                target.check_tables()
                rate = sent / (time.monotonic() - started)
                _say(f"{self.name}: {sent:,} packets, {rate:,.0f} a second")
        target.check_tables()

    def keep(self, packets: int) -> None:
        """One after the other, to write down those that come to reasons not kept so far.

        Raises: Broken.
        """
        target, history = self.target, list[Step]()
        for step in chain(self.whole_ones(), islice(self.frames, packets)):
            if len(history) >= HISTORY:
                target.reset()
                history.clear()
            history.append(step)
            for reason in {target.reasons(r).name.lower() for r in self.send([step])}:
                if not kept.is_known(self.name, reason):
                    kept.keep(self.name, target, history, reason)
                    target.reset()
                    history.clear()


def fuzz(name: str, seed: int, packets: int, keep: bool = False) -> dict[str, int]:
    """So many packets; how often they came to each reason.

    Raises: Broken.
    """
    target = TARGETS[name](keep)
    first = target.before
    try:
        run = Run(name, target, seed)
        if keep:
            run.keep(packets)
        else:
            run.go(packets)
        change = target.before - first
        return {target.reasons(i).name: int(c) for i, c in enumerate(change) if c}
    except Broken as error:
        raise Broken(f"{name}, seed {seed}: {error}") from error
    finally:
        target.close()


def _say(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--packets", default=10_000_000, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=None, type=int, help="to repeat a run; at random if not given")
@click.option("--keep/--no-keep", default=False, help="write what comes to new reasons to corpus/")
@click.option("--target", "names", type=click.Choice(list(TARGETS)), multiple=True)
def main(packets: int, seed: int | None, keep: bool, names: tuple[str, ...]) -> None:
    """Fuzz every target on every processor, and say what the packets came to."""
    first = seed if seed is not None else int.from_bytes(os.urandom(4), "little")
    cpus, names = len(os.sched_getaffinity(0)), names or tuple(TARGETS)
    runs = 1 if keep else cpus  # two would write the same files
    print(f"seed {first}, {packets:,} packets to {', '.join(names)} on {cpus} processors")
    share = -(-packets // (runs * len(names)))
    with ProcessPoolExecutor(cpus) as pool:
        running = [
            (name, pool.submit(fuzz, name, first + n, share, keep))
            for n in range(runs)
            for name in names
        ]
        totals: dict[str, dict[str, int]] = {name: {} for name in names}
        try:
            for name, each in running:
                for reason, count in each.result().items():
                    totals[name][reason] = totals[name].get(reason, 0) + count
        except Broken as error:
            pool.shutdown(cancel_futures=True)
            raise click.ClickException(str(error)) from error
    for name, total in totals.items():
        print(name)
        for reason, count in sorted(total.items()):
            print(f"{count:>12,}  {reason}")
    print(f"{share * runs * len(names):,} packets, each left by one reason")


if __name__ == "__main__":
    main()
