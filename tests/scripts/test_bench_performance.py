"""The performance benchmarks measure what they say.

Each runs as a user runs it, against the bundled model and with tiny numbers; times are checked for
being possible, never for being short. Where figures are computed from arrivals, made-up arrivals
show what they count.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.bench_throughput import figures_of
from scripts.perf_bench.engines import EngineSpec
from scripts.perf_bench.models import SHAPES, weight_shapes

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 100


def run_benchmark(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"scripts.{name}", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)


def figures_from(name: str, file: Path, *flags: str) -> dict[str, Any]:
    """Run a benchmark; returns what it wrote."""
    done = run_benchmark(name, "--json", str(file), *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "caesura" in done.stdout, "no table was printed"
    written: dict[str, Any] = json.loads(file.read_text())
    assert written["cores"] >= 1
    return written


def test_the_throughput_of_two_engines_is_measured_on_the_same_prompts(tmp_path: Path) -> None:
    engines = ("--engine", "caesura", "--engine", "one=caesura --num-threads 1")
    flags = ("--loads", "2:16:128", "1:48:1", "--rounds", "2", "--retry-s", "0")
    runs = figures_from("bench_throughput", tmp_path / "figures.json", *engines, *flags)["runs"]
    order = [(run["load"], run["round"], run["engine"]) for run in runs]
    loads = ("2 x 16+128", "1 x 48+1")
    names = ("caesura", "one")
    assert order == [(load, number, name) for load in loads for number in (0, 1) for name in names]
    for run in runs:
        assert run["output tokens/s"] > 0
        assert run["prefill tokens/s"] > 0
        assert run["first tokens alike"] >= 0.5, "the same model was given the same prompts"
        assert math.isnan(run["decode tokens/s"]) == run["load"].endswith("+1")


def test_decode_is_what_comes_after_the_last_first_token_and_prefill_what_comes_before() -> None:
    arrivals_s = [[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]]
    figures = figures_of(10, arrivals_s)
    assert figures["prefill tokens/s"] == 2 * 10 / 2.0
    assert figures["decode tokens/s"] == 3 / (4.0 - 2.0)
    assert figures["output tokens/s"] == 6 / 4.0
    assert figures["first token, ms"] == 1500


def test_servers_are_measured_under_closed_and_open_loops(tmp_path: Path) -> None:
    flags = ("--requests", "6", "--prompt-length", "8", "--output-length", "5", "--rounds", "1")
    loads = ("--concurrency", "3", "--rate", "50")
    runs = figures_from("bench_serve", tmp_path / "figures.json", *loads, *flags)["runs"]
    assert list(runs) == ["3 clients", "50 requests/s"]
    for by_server in runs.values():
        [figures] = by_server["caesura"]
        assert figures["failed requests"] == 0
        assert 0 < figures["TTFT p50 ms"] <= figures["TTFT p99 ms"] <= figures["E2E p99 ms"]
        assert figures["tokens/s"] == pytest.approx(5 * figures["requests/s"])


def test_a_start_is_ready_before_its_first_token_and_after_its_weights_are_read(
    tmp_path: Path,
) -> None:
    flags = ("--repeats", "1", "--starts", "warm")
    written = figures_from("bench_startup", tmp_path / "figures.json", *flags)
    [figures] = written["runs"]["caesura"]
    ready, first_token = figures["warm start, ready"], figures["warm start, first token"]
    assert figures["read the weights"] < ready < first_token


def test_growing_contexts_and_batches_read_what_they_hold(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    numbers = ("--contexts", "32", "64", "--requests", "1", "3", "--steps", "1")
    done = run_benchmark("bench_growth", "--json", str(file), *numbers)
    assert done.returncode == 0, done.stderr
    of_requests, of_contexts, of_prompts = json.loads(file.read_text())["curves"].values()
    assert list(of_requests) == ["1", "3"]
    assert list(of_contexts) == list(of_prompts) == ["32", "64"]
    a_token = 4 * 2 * 4 * 32 * 2 / 1e9  # layers, keys and values, heads, head size, bytes
    assert of_contexts["64"]["GB read"] - of_contexts["32"]["GB read"] == pytest.approx(
        32 * a_token
    )
    grown = of_requests["3"]["GB read"] - of_requests["1"]["GB read"]
    assert grown == pytest.approx(2 * 128 * a_token)
    assert all(point["tokens/s"] > 0 for point in (*of_requests.values(), *of_prompts.values()))


@pytest.mark.parametrize(
    ("name", "flags", "complaint"),
    [
        ("bench_throughput", ["--engine", "sglang"], "unknown engine 'sglang'"),
        ("bench_throughput", ["--engine", "vllm"], "which interpreter has vLLM"),
        ("bench_throughput", ["--engine", "vllm@/nowhere/python"], "no interpreter"),
        ("bench_throughput", ["--engine", "caesura@/tmp"], "no checkout of Caesura"),
        ("bench_throughput", ["--engine", "caesura", "--engine", "caesura"], "repeat"),
        ("bench_throughput", ["--loads", "4:8"], "is no load"),
        ("bench_throughput", ["--model", "gpt"], "neither a model's directory nor one of"),
        ("bench_serve", ["--server", "sglang"], "unknown server 'sglang'"),
        ("bench_serve", ["--rate", "-1"], "above 0"),
        ("bench_startup", ["--model", "gpt"], "neither a model's directory nor one of"),
        ("bench_growth", ["--requests", "0"], "at least 1"),
    ],
)
def test_an_error_of_use_is_told_in_a_line(name: str, flags: list[str], complaint: str) -> None:
    done = run_benchmark(name, *flags)
    assert done.returncode == 2
    assert complaint in done.stderr.splitlines()[-1]


def test_an_engine_that_cannot_start_says_why_and_fails_the_run() -> None:
    flags = ("--loads", "1:8:1", "--engine", "caesura --dtype float8")
    done = run_benchmark("bench_throughput", *flags)
    assert done.returncode == 1
    assert "dtype='float8' is not supported" in done.stderr


def test_an_engine_is_written_as_a_name_variables_a_kind_a_place_and_arguments() -> None:
    text = f"slow=A=1 B_C=x=y vllm@{sys.executable} --block-size 64 --enforce-eager --dtype float32"
    spec = EngineSpec.parse(text)
    assert (spec.name, spec.kind, spec.interpreter) == ("slow", "vllm", sys.executable)
    assert spec.environment == {"A": "1", "B_C": "x=y"}
    assert spec.arguments == {"block_size": 64, "enforce_eager": True, "dtype": "float32"}
    assert EngineSpec.parse("A=1 caesura").environment == {"A": "1"}


def test_the_shape_of_qwen3_has_the_weights_that_it_is_named_for() -> None:
    sizes = [math.prod(shape) for _, shape in weight_shapes(SHAPES["qwen3-0.6b"])]
    assert sum(sizes) == 596_049_920
