"""The page on the life-cycle names tests and checks that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "lifecycle.md").read_text()
TESTS = sorted(set(re.findall(r"`(test_[\w*]+\.py)`", PAGE)))
SIMULATION = "".join(path.read_text() for path in (ROOT / "scripts" / "simulation").glob("*.py"))
CHECKS = sorted(
    {
        name
        for paragraph in re.findall(r"simulation:(.*?)(?:\n\n|$)", PAGE, re.DOTALL)
        for name in re.findall(r"`([a-z ]+)`", " ".join(paragraph.split()))
    }
)


@pytest.mark.parametrize("pattern", TESTS)
def test_a_test_that_the_page_names_exists(pattern: str) -> None:
    assert list((ROOT / "tests").rglob(pattern))


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_that_the_page_names_is_made(name: str) -> None:
    assert f'"{name}"' in SIMULATION


def test_every_guarantee_says_what_holds_it() -> None:
    sections = re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]
    assert [section.split(":")[0] for section in sections] == [f"L{n}" for n in range(1, 14)]
    for section in sections:
        assert "*Held by*" in section
        assert "simulation" in section
