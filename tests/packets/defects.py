# SPDX-License-Identifier: Apache-2.0
"""Programs with one deliberate defect each, built from the real source with one phrase changed.

A check that has never failed proves nothing: these are what the flow-keeping test must catch. The
objects are built by `make build`, so that a machine without clang can run the test.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build" / "defects"

# name: (file, phrase, what it becomes)
PROGRAM_DEFECTS = {
    "repeated SYN moves": (
        "bpf/flow.h",
        "if (state == FLOW_CLOSING)\n\t\t\treturn 0;",
        "return 0;",
    ),
    "full table sends SYN to cur": (
        "bpf/flow.h",
        "restart_window(p->slot);\n\treturn old;",
        "restart_window(p->slot);\n\treturn id;",
    ),
    "full table does not restart the window": ("bpf/flow.h", "\trestart_window(p->slot);\n", ""),
    "an older flow follows a later SYN": (
        "bpf/flow.h",
        "if (pkt->seq - READ_ONCE(at->line->isn) > ISN_WINDOW)",
        "if (0)",
    ),
    "unknown packets go to cur": (
        "bpf/flow.h",
        "id = opens(pkt) ? p->cur : old;",
        "id = p->cur;",
    ),
    "failing backends are forgotten": (
        "bpf/flow.h",
        "!(flags & BACKEND_KNOWN))",
        "!is_up(id))",
    ),
    "a busy flow's time is not written": (
        "bpf/select.h",
        "flow_state(word) != FLOW_CONFIRMED ||",
        "flow_state(word) != FLOW_CONFIRMED || 0 &&",
    ),
    "a flow under way follows a backend that gets no packets": (
        "bpf/select.h",
        "if (unlikely(!b || !gets_packets(b->flags)))",
        "if (unlikely(!b))",
    ),
}


def object_of(defect: str) -> Path:
    """Where a defect's object is."""
    return BUILT / (defect.replace(" ", "-") + ".bpf.o")


def build(defect: str) -> None:
    """Build one defect's object.

    Raises: RuntimeError if the phrase does not stand in the source exactly once.
    """
    name, phrase, becomes = PROGRAM_DEFECTS[defect]
    with tempfile.TemporaryDirectory() as tree:
        for folder in ("bpf", "xdp"):
            shutil.copytree(ROOT / folder, Path(tree) / folder)
        source = Path(tree) / name
        text = source.read_text()
        if text.count(phrase) != 1:
            raise RuntimeError(f"{name} has {text.count(phrase)} times {phrase!r}, not once")
        source.write_text(text.replace(phrase, becomes))
        out = object_of(defect)
        out.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [
                *(
                    "clang",
                    "-O2",
                    "-g",
                    "-target",
                    "bpf",
                    "-mcpu=v3",
                    "-fno-strict-aliasing",
                    "-Ibpf",
                ),
                f"-I/usr/include/{platform.machine()}-linux-gnu",
                *("-c", "xdp/lb.bpf.c", "-o", str(out)),
            ],
            cwd=tree,
            check=True,
        )


if __name__ == "__main__":
    for each in sys.argv[1:] or PROGRAM_DEFECTS:
        build(each)
