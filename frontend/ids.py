"""Ids that nobody else makes up, for less than a system call."""

from __future__ import annotations

import itertools
import secrets

_of_this_process = secrets.token_hex(8)
_count = itertools.count(1)


def new_id() -> str:
    """Unique for ever, in any process."""
    return f"{_of_this_process}{next(_count):08x}"
