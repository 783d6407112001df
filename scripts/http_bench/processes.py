"""What a server costs: CPU time and memory of a process and all its descendants (Linux)."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def process_tree(pid: int) -> list[int]:
    """`pid` and its living descendants."""
    children = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it may end meanwhile
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children[parent].append(int(entry.name))
    tree = [pid]
    for member in tree:
        tree.extend(children[member])
    return tree


def cpu_time_s(tree: list[int]) -> float:
    """User and system time of these processes, of their ended threads too.

    Read from each process's own CPU clock, to the nanosecond; /proc counts in ticks of 10 ms.
    """
    total_s = 0.0
    for pid in tree:
        with suppress(OSError):
            # The clock's number, as clock_getcpuclockid(3) makes it on Linux.
            total_s += time.clock_gettime((~pid << 3) | 2)
    return total_s


def resident_bytes(tree: list[int]) -> int:
    """Resident memory; pages that processes share count in each."""
    total = 0
    for pid in tree:
        with suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    return total
