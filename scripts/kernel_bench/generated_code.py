"""What can be read from a compiled kernel: its resources, and the instructions that matter."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton


@dataclass(frozen=True, slots=True)
class GeneratedCode:
    """What PTX says about the instructions that matter."""

    matrix: frozenset[str]
    """Kinds of matrix instructions: mma.sync (Ampere), wgmma (Hopper), tcgen05 (Blackwell)."""
    async_bytes: frozenset[int]
    """Widths of the asynchronous copies from global to shared memory."""

    @classmethod
    def of(cls, ptx: str) -> GeneratedCode:
        """Read it."""
        matrix = re.findall(r"\b(mma\.sync|wgmma|tcgen05)\.\S*mma|\b(mma\.sync)", ptx)
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global [^,]+,[^,]+, (?:0x)?(\w+)", ptx)
        return cls(
            frozenset(name for pair in matrix for name in pair if name),
            frozenset(int(width, 16) for width in copies),
        )

    def faults(self) -> list[str]:
        """What it lacks of a kernel that multiplies matrices out of the cache."""
        faults = []
        if not self.matrix:
            faults.append("has no matrix instruction")
        if not self.async_bytes:
            faults.append("has no asynchronous loads")
        elif self.async_bytes != {16}:
            widths = sorted(self.async_bytes)
            faults.append(f"has asynchronous loads of {widths} bytes, not of 16 alone")
        return faults

    def __str__(self) -> str:
        widths = ", ".join(map(str, sorted(self.async_bytes)))
        return f"{' + '.join(sorted(self.matrix))}, loads of {widths} B"


def resource_usage(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers and stack bytes a thread, by Triton's own cuobjdump; None without it."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not program.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (None, None)
