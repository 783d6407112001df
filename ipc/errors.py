"""The one error of the wire: something that may not cross it, named by field path and value.

Invariant: every encoder and decoder in `ipc` raises `WireError` and nothing else for bad data,
however hostile.
"""

from __future__ import annotations

import reprlib


class WireError(ValueError):
    """A frame or value that breaks the protocol; the message names the field, the value and what
    was expected."""


class _Shortener(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxlist = self.maxtuple = self.maxdict = 4
        self.maxstring = self.maxother = 60

    def repr_bytes(self, value: bytes, level: int) -> str:
        return f"<{len(value)} bytes>"

    def repr_memoryview(self, value: memoryview, level: int) -> str:
        return f"<{value.nbytes} bytes>"

    def repr_ExtType(self, value: tuple[int, bytes], level: int) -> str:
        return f"<{len(value[1])} bytes of extension type {value[0]}>"


_shortener = _Shortener()


def shorten(value: object) -> str:
    """A representation of at most 100 characters; never expensive, however large or deep `value`
    is."""
    text = _shortener.repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def mismatch(path: str, value: object, expected: str) -> WireError:
    """The error for `value` at `path` that is not what the protocol wants there."""
    return WireError(f"{path}: expected {expected}, got {shorten(value)}")
