"""Processes made to stand still while others are measured: some servers spin while they are idle.

Invariant: whoever was stopped goes on at the end of the block, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator

from scripts.http_bench.processes import process_tree


@contextlib.contextmanager
def stopped(pids: Iterable[int]) -> Iterator[None]:
    """Within the block neither these processes run nor any descendants that they have now."""
    members = [member for pid in pids for member in process_tree(pid)]
    try:
        for member in members:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
                os.kill(member, signal.SIGSTOP)
        yield
    finally:
        for member in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGCONT)
