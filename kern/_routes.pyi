# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence

AT_ONCE: int

def ask(fd: int, sequence: int, addresses: Sequence[bytes], /) -> tuple[list[bytes | int], int]:
    """Ask for the routes to so many addresses, in network order, on a route netlink socket.

    The requests have the sequence numbers from `sequence` on. Waits as long as the socket does.

    Shape:  at most AT_ONCE addresses; for each the answer: `struct rtmsg` and its attributes but
            the destination, or the errno that the kernel gave. And 0, or an errno if answers
            may still come: then that stands for those that did not.
    Raises: ValueError for another number of addresses or of their bytes. Nothing is asked then.
    """
