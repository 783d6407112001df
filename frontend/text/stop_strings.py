"""Finds stop strings in a text that arrives in pieces.

Invariants
- The text ends at the first character with which any stop string is complete; of several that are
  complete there, the longest counts. This depends on the text alone, not on how it was cut into
  pieces.
- Nothing is given out that may belong to a stop string still to be completed, and everything else
  is given out at once.
- A matcher costs no more memory than its stop strings. A character costs one look at each of them,
  and one more for each piece that comes while it is the first to be held back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string that was found."""

    stop: str
    text: str
    """What is still to be given out: the text before the stop string, or up to its end if it is to
    be included."""


class StopStrings:
    """The matcher of one stream."""

    __slots__ = ("_first", "_held_back", "_include", "_inner", "_longest", "_stops")

    def __init__(self, stops: Sequence[str], *, include_in_output: bool = False) -> None:
        """`stops` are not empty."""
        self._stops = tuple(stops)
        self._include = include_in_output
        self._held_back = ""
        self._longest, self._first, self._inner = _characters(self._stops)

    @property
    def held_back(self) -> str:
        """The longest end of the text so far that begins a stop string."""
        return self._held_back

    def add(self, text: str, *, match: bool = True) -> str | StopMatch:
        """Take the next piece of text; returns what may be given out, or the match, which is final.

        With `match=False`, stop strings that `text` completes do not count (one that it begins may
        still be completed later).
        """
        seen = self._held_back
        text = seen + text
        if match and (found := self._find(text, len(seen))) is not None:
            return found
        # Most text ends in a character that no beginning has, which one look-up tells.
        if text and text[-1] in self._inner:
            stops, first = self._stops, self._first
            for start in range(max(0, len(text) - self._longest + 1), len(text)):
                if text[start] in first:
                    end = text[start:]
                    for stop in stops:
                        if stop.startswith(end) and stop != end:
                            self._held_back = end
                            return text[:start]
        self._held_back = ""
        return text

    def finish(self) -> str:
        """The text that was held back, now that nothing can complete it."""
        text, self._held_back = self._held_back, ""
        return text

    def _find(self, text: str, num_seen: int) -> StopMatch | None:
        """The match in `text` that ends first, but behind its first `num_seen` characters."""
        first: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop, max(0, num_seen - len(stop) + 1))
            if start >= 0 and (first is None or (start + len(stop), start, stop) < first):
                first = (start + len(stop), start, stop)
        if first is None:
            return None
        end, start, stop = first
        return StopMatch(stop, text[: end if self._include else start])


@functools.lru_cache(maxsize=64)
def _characters(stops: tuple[str, ...]) -> tuple[int, str, str]:
    """The longest stop's length, the first characters of all, and all but their last ones.

    The completions of one prompt, and mostly many calls, have the same stop strings.
    """
    longest = max(map(len, stops), default=0)
    return longest, "".join(stop[0] for stop in stops), "".join(stop[:-1] for stop in stops)
