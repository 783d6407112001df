"""What to say of a name that is not known: the one that may have been meant, and all of them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

_MIN_LIKENESS = 0.5
_MAX_GUESSED_CHARS = 64
"""Comparing costs the square of the length."""


def known_names(name: str, known: Sequence[str]) -> str:
    """`did you mean 'x'? Known are x, y`; without a guess where nothing known is similar."""
    nearest = difflib.get_close_matches(name[:_MAX_GUESSED_CHARS], known, n=1, cutoff=_MIN_LIKENESS)
    beginning = f"did you mean {nearest[0]!r}? Known" if nearest else "known"
    return f"{beginning} are {', '.join(known)}"
