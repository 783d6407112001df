"""The README's Python programs run as they stand there, and its links and paths lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PAGES = ["README.md", *(f"docs/{page.name}" for page in (REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.splitlines()[-1].strip())
def test_a_program_of_the_readme_runs_and_says_something(program: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=90,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY), "CAESURA_LOG_LEVEL": "ERROR"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
    assert "Traceback" not in run.stderr


def test_the_readme_has_programs() -> None:
    assert len(PROGRAMS) == 3


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_to_a_file_or_a_heading(page: str) -> None:
    text = (REPOSITORY / page).read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in headings}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert (REPOSITORY / page).parent.joinpath(target).exists(), target


def test_every_script_and_folder_that_the_readme_names_exists() -> None:
    named = re.findall(
        r"\b((?:scripts|frontend|tests|docs|ipc|kernels|engine_core)/[\w./]*)", README
    )
    assert named
    assert [path for path in named if not (REPOSITORY / path.rstrip(".")).exists()] == []
