"""The benchmarks of HTTP servers run against ours, and what they find is sound.

Each runs as a user runs it, with tiny numbers; its figures are checked where they are counts, and
never where they are times.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 100


def run_benchmark(name: str, figures: Path, *flags: str) -> dict[str, Any]:
    """Run a benchmark of our own server; returns what it wrote."""
    command = [sys.executable, "-m", f"scripts.{name}", "--json", str(figures), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "caesura" in done.stdout, "no table was printed"
    written: dict[str, Any] = json.loads(figures.read_text())
    return written


def test_the_benchmark_of_costs_sees_every_request_answered_in_full(tmp_path: Path) -> None:
    flags = ("--repeats", "1", "--streams", "4", "--requests", "8", "--tokens", "5")
    runs = run_benchmark("bench_http", tmp_path / "figures.json", *flags)["runs"]
    for load in ("paced", "unpaced"):
        [figures] = runs[load]["caesura"]
        assert figures["failed requests"] == 0
        assert 0 < figures["events/token"] <= 1
        assert figures["CPU us/token"] > 0


def test_L7_the_benchmark_of_storms_sees_every_client_aborted_once_and_nothing_left(
    tmp_path: Path,
) -> None:
    flags = ("--clients", "20", "--bystanders", "4", "--later", "5", "--non-streaming-share", "0.5")
    columns = run_benchmark("bench_storm", tmp_path / "figures.json", *flags)["servers"]
    figures = columns["caesura"]
    assert sum(map(int, figures["ids per engine"].split(", "))) == 20
    assert figures["clients not aborted"] == figures["left live at engines"] == 0
    assert figures["lost bystanders"] == figures["later requests failed"] == 0


def test_the_benchmark_of_hang_ups_sees_blocks_come_back_at_every_stage(tmp_path: Path) -> None:
    columns = run_benchmark("bench_hang_up", tmp_path / "figures.json", "--hang-ups", "2")
    stages = columns["servers"]["caesura"]
    assert list(stages) == ["streaming", "non-streaming", "queued", "mid-prefill"]
    for figures in stages.values():
        assert figures["hang-ups"] == 2
        assert figures["missed"] == figures["at another stage"] == 0
    assert stages["queued"]["wasted tokens, max"] == 0
