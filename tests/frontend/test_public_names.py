"""`import caesura`: what it offers, and what it says when another package stands in its way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import caesura

REPOSITORY = Path(__file__).parents[2]


def import_caesura(in_directory: Path) -> subprocess.CompletedProcess[str]:
    """With `in_directory` before our own on the module path, like a user's own folder."""
    code = f"import sys; sys.path.append({str(REPOSITORY)!r}); import caesura"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=in_directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_public_names_are_there_and_nothing_else() -> None:
    assert {"AsyncEngine", "Engine", "SamplingParams"} <= set(caesura.__all__)
    assert caesura.__all__ == sorted(caesura.__all__)
    for name in caesura.__all__:
        assert getattr(caesura, name).__doc__


@pytest.mark.parametrize("package", ["ipc", "frontend"])
def test_a_package_that_shadows_ours_is_named_with_its_path(tmp_path: Path, package: str) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    imported = import_caesura(tmp_path)
    assert imported.returncode == 1
    last_line = imported.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError")
    assert str(tmp_path / package) in last_line
    assert "from another directory" in last_line


def test_a_folder_that_is_no_package_shadows_nothing(tmp_path: Path) -> None:
    (tmp_path / "ipc").mkdir()
    imported = import_caesura(tmp_path)
    assert imported.returncode == 0, imported.stderr


def test_importing_caesura_does_not_import_torch(tmp_path: Path) -> None:
    code = "import sys, caesura; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)
