"""The machine that figures come from: what it is, and what else it does meanwhile (Linux)."""

from __future__ import annotations

import os
from pathlib import Path


def describe_machine() -> dict[str, object]:
    """Its processor and the cores that this process may use."""
    processor = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            processor = value.strip()
            break
    return {"processor": processor, "cores": len(os.sched_getaffinity(0))}


def busy_s() -> float:
    """CPU time of all that ever ran on this machine, in steps of 10 ms."""
    user, nice, system, _, _, *interrupts = map(
        int, Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
    )
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
