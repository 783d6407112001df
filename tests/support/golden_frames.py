"""Frames written by vLLM 0.32's own message types, read from `tests/data/vllm-0.32-frames.txt`.

A message there is a heading (`## NAME frames N`) and one line of hex a frame. A line that ends in
"..." holds only the frame's beginning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_FILE = Path(__file__).parents[1] / "data" / "vllm-0.32-frames.txt"
_HEADING = re.compile(r"## (.+) frames \d+")
_HEX = re.compile(r"  hex\[\d+\] \((\d+)B\): ([0-9a-f]+)(\.\.\.)?")


@dataclass(frozen=True, slots=True)
class GoldenFrame:
    """`content` is the whole frame, or the beginning of one of `num_bytes` bytes."""

    content: bytes
    num_bytes: int

    @property
    def is_whole(self) -> bool:
        return len(self.content) == self.num_bytes


def load_golden_messages() -> dict[str, list[GoldenFrame]]:
    """All messages by name."""
    messages: dict[str, list[GoldenFrame]] = {}
    name = ""
    for line in _FILE.read_text().splitlines():
        if heading := _HEADING.fullmatch(line):
            name = heading[1]
            messages[name] = []
        elif frame := _HEX.fullmatch(line):
            messages[name].append(GoldenFrame(bytes.fromhex(frame[2]), int(frame[1])))
    return messages


GOLDEN = load_golden_messages()
WHOLE_GOLDEN = {
    name: [frame.content for frame in frames]
    for name, frames in GOLDEN.items()
    if all(frame.is_whole for frame in frames)
}
