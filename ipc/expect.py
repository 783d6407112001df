"""Strict checks of decoded values: each takes a value and its field path and returns it typed, or
raises `WireError`.

Invariant: a bool is never an integer here, an integer is a number, and a number is finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar, cast

import msgpack

from ipc.codec import ARRAY_EXT_TYPE
from ipc.errors import mismatch

_T = TypeVar("_T")
Check = Callable[[object, str], object]

INT64_MIN, INT64_MAX, UINT64_MAX = -(2**63), 2**63 - 1, 2**64 - 1
MAX_TOKEN_ID = 2**31 - 1
MAX_DEPTH = 32
"""Deepest nesting of a field whose shape the protocol leaves open."""


def integer(value: object, path: str, minimum: int = INT64_MIN, maximum: int = INT64_MAX) -> int:
    """An integer from `minimum` to `maximum`."""
    if type(value) is not int:
        raise mismatch(path, value, "an integer")
    if not minimum <= value <= maximum:
        raise mismatch(path, value, f"an integer from {minimum} to {maximum}")
    return value


def count(value: object, path: str) -> int:
    """An integer that is not negative."""
    return integer(value, path, 0)


def number(value: object, path: str) -> float:
    """A finite number; an integer is accepted and made a float."""
    if type(value) is int and INT64_MIN <= value <= UINT64_MAX:
        return float(value)
    if type(value) is not float or not math.isfinite(value):
        raise mismatch(path, value, "a finite number")
    return value


def boolean(value: object, path: str) -> bool:
    if type(value) is not bool:
        raise mismatch(path, value, "true or false")
    return value


def text(value: object, path: str) -> str:
    if type(value) is not str:
        raise mismatch(path, value, "a string")
    return value


def array(value: object, path: str, minimum_length: int = 0) -> list[object]:
    """A list with at least `minimum_length` entries; how many more there are is nobody's
    business."""
    if type(value) is not list:
        raise mismatch(path, value, "an array")
    if len(value) < minimum_length:
        raise mismatch(path, value, f"an array of at least {minimum_length} entries")
    return cast(list[object], value)


def mapping(value: object, path: str) -> dict[object, object]:
    if type(value) is not dict:
        raise mismatch(path, value, "a map")
    return cast(dict[object, object], value)


def texts(value: object, path: str) -> list[str]:
    """A list of strings."""
    entries = array(value, path)
    for index, entry in enumerate(entries):
        if type(entry) is not str:
            raise mismatch(f"{path}[{index}]", entry, "a string")
    return cast(list[str], entries)


def token_ids(value: object, path: str) -> list[int]:
    """A list of integers from 0 to `MAX_TOKEN_ID`."""
    entries = cast(list[int], array(value, path))
    if not entries or (
        set(map(type, entries)) == {int} and min(entries) >= 0 and max(entries) <= MAX_TOKEN_ID
    ):
        return entries
    for index, entry in enumerate(entries):
        integer(entry, f"{path}[{index}]", 0, MAX_TOKEN_ID)
    raise AssertionError("unreachable: one of the entries is bad")


def optional(check: Callable[[object, str], _T], value: object, path: str) -> _T | None:
    """`check`, unless the value is nil."""
    return None if value is None else check(value, path)


def nullable(check: Check) -> Check:
    """`check`, made to let nil pass."""
    return lambda value, path: optional(check, value, path)


def opaque(value: object, path: str) -> object:
    """Any plain value nested at most `MAX_DEPTH` deep, for fields whose shape the protocol leaves
    open."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        deeper: list[object] = []
        for entry in level:
            kind = type(entry)
            if kind is list:
                deeper.extend(cast(list[object], entry))
            elif kind is dict:
                fields = cast(dict[object, object], entry)
                deeper.extend(fields)
                deeper.extend(fields.values())
            elif entry is None or kind in (bool, int, float, str, bytes):
                continue
            elif not (isinstance(entry, msgpack.ExtType) and entry.code == ARRAY_EXT_TYPE):
                raise mismatch(
                    path, entry, "plain data (nil, numbers, strings, bytes, arrays, maps)"
                )
        if not deeper:
            return value
        level = deeper
    raise mismatch(path, value, f"data nested at most {MAX_DEPTH} deep")


def opaque_mapping(value: object, path: str) -> dict[object, object]:
    """A map whose contents the protocol leaves open."""
    opaque(value, path)
    return mapping(value, path)
