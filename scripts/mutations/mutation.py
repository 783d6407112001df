"""A bug that can be planted: exact replacements of source text.

Invariant: the text to be replaced occurs exactly once, whatever its indentation. Code that has
moved on makes a mutation fail loudly, and not plant nothing.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path


class MutationError(Exception):
    """A mutation no longer fits the code; names it, its file and its text."""


@dataclass(frozen=True, slots=True)
class Edit:
    """One replacement in one file: part of a line, or whole lines with any common indentation."""

    file: str
    """Relative to the root of the repository."""
    old: str
    new: str
    """Its lines are indented as the replaced ones were."""


class Mutation:
    """A bug: a name, what it is in one sentence, where it comes from, and how it is planted."""

    def __init__(self, name: str, what: str, *edits: Edit, origin: str = "") -> None:
        """`origin`: a peer that had it, with the number of an issue if there is one."""
        self.name = name
        self.what = what
        self.edits = edits
        self.origin = origin

    def apply(self, root: Path) -> dict[str, str]:
        """The new text of each file that it changes, by its path below `root`. Raises
        MutationError.
        """
        changed: dict[str, str] = {}
        for edit in self.edits:
            try:
                source = changed.get(edit.file) or (root / edit.file).read_text()
                changed[edit.file] = _replaced(source, edit)
            except (OSError, ValueError) as error:
                raise MutationError(
                    f"mutation {self.name} does not fit {edit.file}: {error}"
                ) from error
        return changed


def _replaced(source: str, edit: Edit) -> str:
    old, new = (textwrap.dedent(text).strip("\n").split("\n") for text in (edit.old, edit.new))
    found: list[tuple[int, int, str]] = []
    start = source.find(old[0])
    while start >= 0:
        line = source[source.rfind("\n", 0, start) + 1 :]
        indent = line[: len(line) - len(line.lstrip(" "))]
        if source.startswith(_indented(old, indent), start):
            found.append((start, start + len(_indented(old, indent)), indent))
        start = source.find(old[0], start + 1)
    if len(found) != 1:
        text = "\n".join(old)
        raise ValueError(f"this text occurs {len(found)} times, not once:\n{text}")
    [(start, end, indent)] = found
    return source[:start] + _indented(new, indent) + source[end:]


def _indented(lines: list[str], indent: str) -> str:
    """As one text; the first line stands behind its indentation already."""
    return "\n".join([lines[0], *(indent + line if line else line for line in lines[1:])])
