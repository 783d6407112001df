"""Every test that the tables of the peers' tests and hazards name exists, so they cannot rot."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / "docs" / name).read_text() for name in ("peer_tests.md", "hazards.md")}
TEST = r"`(tests/[\w/]+\.py)::(\w+)`"
NAMED = {name: sorted(set(re.findall(TEST, page))) for name, page in PAGES.items()}


@cache
def names_in(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, kinds))


@pytest.mark.parametrize(
    ("path", "name"), sorted({each for page in NAMED.values() for each in page})
)
def test_a_test_that_a_page_names_exists(path: str, name: str) -> None:
    assert (ROOT / path).exists()
    assert name in names_in(path)


@pytest.mark.parametrize("page", PAGES)
def test_every_row_names_a_test_of_ours_or_says_why_not(page: str) -> None:
    rows = re.findall(r"^\| (?!their test|#|---)(.*) \|$", PAGES[page], re.MULTILINE)
    assert len(rows) > 50
    for row in rows:
        ours = row.split(" | ")[-1].removeprefix("| ")
        assert re.fullmatch(TEST, ours) or ours.startswith("left out: "), row


@pytest.mark.parametrize(
    ("page", "files"),
    [("peer_tests.md", "test_peer_tests_*.py"), ("hazards.md", "test_hazards_*.py")],
)
def test_every_test_that_was_written_for_a_page_is_on_it(page: str, files: str) -> None:
    for path in sorted((ROOT / "tests" / "frontend").glob(files)):
        relative = str(path.relative_to(ROOT))
        written = {name for name in names_in(relative) if name.startswith("test_")}
        assert written == {name for file, name in NAMED[page] if file == relative}
