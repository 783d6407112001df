"""The known bugs still fit the code that they are planted in, and a planted one is found."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from scripts.mutations.catalogue import ALL
from scripts.mutations.mutation import Edit, Mutation, MutationError

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 110


def mutate(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/mutate.py", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)


@pytest.mark.parametrize("mutation", ALL, ids=lambda mutation: mutation.name)
def test_a_known_bug_still_fits_the_code(mutation: Mutation) -> None:
    changed = mutation.apply(ROOT)
    assert changed
    for file, source in changed.items():
        before = (ROOT / file).read_text()
        assert ast.dump(ast.parse(source)) != ast.dump(ast.parse(before))


def test_bugs_have_names_of_their_own_and_are_told_in_a_sentence() -> None:
    assert len(ALL) >= 34
    assert max(Counter(mutation.name for mutation in ALL).values()) == 1
    for mutation in ALL:
        assert mutation.what.endswith(".")


def test_lines_are_replaced_whatever_their_indentation(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("if a:\n    if b:\n        c()\n\nd()\n")
    edit = Edit("code.py", "if b:\n    c()", "while b:\n\n    e()\n    f()")
    changed = Mutation("it", "It is wrong.", edit).apply(tmp_path)
    assert changed == {"code.py": "if a:\n    while b:\n\n        e()\n        f()\n\nd()\n"}


@pytest.mark.parametrize("old", ["gone()", "c()"])
def test_text_that_does_not_occur_once_is_an_error_that_names_the_bug(
    tmp_path: Path, old: str
) -> None:
    (tmp_path / "code.py").write_text("c()\nc()\n")
    with pytest.raises(MutationError, match=r"mutation it does not fit code.py: .* times"):
        Mutation("it", "It is wrong.", Edit("code.py", old, "d()")).apply(tmp_path)


@pytest.mark.timeout(120)
def test_a_planted_bug_is_found_and_told(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    flags = ("--only", "acknowledged_before_free", "--seeds", "40", "--json", str(figures))
    done = mutate(*flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "without a bug: nothing in 40 seeds" in done.stdout
    assert "1 of 1 bugs were found" in done.stdout
    [finding] = json.loads(figures.read_text())["mutations"]
    assert finding["name"] == "acknowledged_before_free"
    assert finding["seed"] < 40
    assert finding["check"] == "effect first"


@pytest.mark.timeout(120)
def test_a_bug_that_is_not_found_is_told_by_the_status() -> None:
    done = mutate("--only", "linger_without_end", "--seeds", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "NOT FOUND" in done.stdout


def test_bugs_are_listed_by_topic_and_unknown_names_are_refused() -> None:
    listed = mutate("--list", "--only", "pauses")
    assert listed.returncode == 0
    assert "stale_abort_marker" in listed.stdout
    assert "match_by_prefix" not in listed.stdout
    refused = mutate("--only", "no_such_bug")
    assert refused.returncode == 2
    assert "no_such_bug" in refused.stderr
