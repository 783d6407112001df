"""Every test that `docs/peer_tests.md` names exists, so the table cannot rot."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "peer_tests.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


@cache
def names_in(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, kinds))


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_a_test_that_the_page_names_exists(path: str, name: str) -> None:
    assert (ROOT / path).exists()
    assert name in names_in(path)


def test_every_row_names_a_test_of_ours_or_says_why_not() -> None:
    rows = re.findall(r"^\| (?!their test|---)(.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) > 60
    for row in rows:
        ours = row.split(" | ")[-1].removeprefix("| ")
        assert re.fullmatch(r"`tests/[\w/]+\.py::\w+`", ours) or ours.startswith("left out: "), row


def test_every_test_that_was_written_for_a_peer_is_on_the_page() -> None:
    for path in sorted((ROOT / "tests" / "frontend").glob("test_peer_tests_*.py")):
        relative = str(path.relative_to(ROOT))
        written = {name for name in names_in(relative) if name.startswith("test_")}
        assert written == {name for file, name in NAMED if file == relative}
