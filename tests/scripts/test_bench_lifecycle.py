"""The benchmarks of pauses, receipts and weight updates run, and what they promise holds.

Each runs as a user runs it, with tiny numbers. A benchmark fails by itself if a promise is broken,
so what is checked here is that it looked: its counts are those of what was asked for.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 110


def run_benchmark(name: str, figures: Path, *flags: str) -> dict[str, Any]:
    """Run a benchmark; returns what it wrote."""
    command = [sys.executable, "-m", f"scripts.{name}", "--json", str(figures), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "what must not happen" in done.stdout, "no table was printed"
    written: dict[str, Any] = json.loads(figures.read_text())
    for of_column in written["faults"].values():
        assert of_column
        assert not any(of_column.values())
    return written


@pytest.mark.timeout(120)
def test_L9_the_benchmark_of_pauses_sees_every_mode_treat_streams_and_newcomers_as_it_says(
    tmp_path: Path,
) -> None:
    flags = ("--repeats", "1", "--streams", "5", "--running", "2", "--tokens", "500")
    later = ("--later", "2", "--later-tokens", "20")
    written = run_benchmark("bench_pause", tmp_path / "figures.json", *flags, *later)
    columns = written["figures"]
    assert list(columns) == ["abort", "wait", "keep", "retract"]
    assert columns["abort"]["ended by it"] == 5
    assert columns["keep"]["frozen by it"] == columns["retract"]["retracted by it"] == 2
    for mode, figures in columns.items():
        assert figures["newcomers held"] == figures["newcomers rejected"] == 6
        assert (figures["held while paused"] > 0) == (mode == "keep")
        assert figures["held at the end"] == 0
        assert figures["pause answered after, ms"] > 0
        for tokens in written["tokens_at_the_pause"][mode]:
            assert len(tokens) == 5
            assert sum(count > 0 for count in tokens) == 2
    assert all(sum(tokens) == 1000 for tokens in written["tokens_at_the_pause"]["wait"])


@pytest.mark.timeout(120)
def test_L5_the_benchmark_of_receipts_sees_requests_and_blocks_gone_at_each(tmp_path: Path) -> None:
    flags = ("--streams", "6", "--aborts", "8", "--aborts-of-all", "2")
    columns = run_benchmark("bench_receipts", tmp_path / "figures.json", *flags)["figures"]
    assert list(columns) == ["one by id", "all at once"]
    assert columns["one by id"]["receipts"] == 8
    assert columns["one by id"]["requests ended by one"] == 1
    assert columns["all at once"]["requests ended by one"] > 4, "one may just have ended by itself"
    for figures in columns.values():
        assert figures["would have shown"] > 0, "blocks that stay would not have been seen"
        assert figures["blocks beyond need, most"] <= 0
        assert figures["receipt after, p99 ms"] > 0


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_L10_the_benchmark_of_weight_updates_sees_every_token_made_by_the_weights_it_is_said_to(
    tmp_path: Path,
) -> None:
    flags = ("--repeats", "1", "--streams", "3", "--tokens", "500")
    columns = run_benchmark("bench_weight_update", tmp_path / "figures.json", *flags)["figures"]
    modes = ("keep", "retract", "abort")
    assert list(columns) == [f"{mode}/{way}" for mode in modes for way in ("disk", "tensors")]
    for figures in columns.values():
        assert figures["judged"] == 3
        assert figures["sharp spans"] > 0, "a boundary that is off would not have been seen"
        assert figures["stood still for, ms"] > 0
