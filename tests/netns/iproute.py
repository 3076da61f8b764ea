# SPDX-License-Identifier: Apache-2.0
"""`ip` and `tc` where they load or attach a program."""

import os
from pathlib import Path

from shunt.lab.netns import Namespace
from shunt.lab.topology import remove_tree


def run(here: Namespace, *argv: str) -> None:
    """Run one to its end. It makes directories in the BPF file system, and would leave them there.

    Raises: ShuntError with what it printed, if it failed.
    """
    place = Path(f"/sys/fs/bpf/shunt-iproute-{os.getpid()}")
    place.mkdir()
    try:
        here.run("env", f"TC_BPF_MNT={place}", *argv)
    finally:
        remove_tree(place)
