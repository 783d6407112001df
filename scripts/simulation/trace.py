"""What happened in a run, as lines and as one number.

Invariant: two runs of one scenario have the same checksum, in any process.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise of the contract."""

    check: str
    what: str
    at_s: float

    def __str__(self) -> str:
        return f"{self.check}: {self.what} (at {self.at_s * 1000:.2f} ms)"


class Trace:
    """Notes every event; keeps lines only if they are wanted."""

    def __init__(self, *, is_detailed: bool = False) -> None:
        self.is_detailed = is_detailed
        self.lines: list[str] = []
        self.num_events = 0
        self.checksum = 0
        self.violation: Violation | None = None
        """The first one."""

    def note(self, at_s: float, *what: object) -> None:
        self.num_events += 1
        self.checksum = zlib.crc32(repr((at_s, what)).encode(), self.checksum)
        if self.is_detailed:
            self.lines.append(f"{at_s * 1000:10.3f} ms  {' '.join(map(str, what))}")

    def violate(self, at_s: float, check: str, what: str) -> None:
        if self.violation is None:
            self.violation = Violation(check, what, at_s)
            self.note(at_s, "VIOLATION", check, what)
