"""Finds stop strings in a text that arrives in pieces.

Invariants
- The text ends at the first character with which any stop string is complete; of several that are
  complete there, the longest counts. This depends on the text alone, not on how it was cut into
  pieces.
- Nothing is given out that may belong to a stop string still to be completed, and everything else
  is given out at once.
"""

from __future__ import annotations

from collections import defaultdict
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

    __slots__ = ("_beginnings", "_held_back", "_include", "_stops")

    def __init__(self, stops: Sequence[str], *, include_in_output: bool = False) -> None:
        """`stops` are not empty."""
        self._stops = tuple(stops)
        self._include = include_in_output
        self._held_back = ""
        """The longest end of the text so far that begins a stop string."""
        beginnings: defaultdict[str, set[str]] = defaultdict(set)
        for stop in stops:
            for length in range(1, len(stop)):
                beginnings[stop[length - 1]].add(stop[:length])
        self._beginnings = {
            last: sorted(found, key=len, reverse=True) for last, found in beginnings.items()
        }
        """Proper beginnings of stop strings by their last character, longest first: most text ends
        in a character that has none, which one look-up tells."""

    def add(self, text: str, *, match: bool = True) -> str | StopMatch:
        """Take the next piece of text; returns what may be given out, or the match, which is final.

        With `match=False`, stop strings that `text` completes do not count (one that it begins may
        still be completed later).
        """
        seen = self._held_back
        text = seen + text
        if match and (found := self._find(text, len(seen))) is not None:
            return found
        for beginning in self._beginnings.get(text[-1:], ()):
            if text.endswith(beginning):
                self._held_back = beginning
                return text[: -len(beginning)]
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
