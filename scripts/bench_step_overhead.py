"""What the engine's own loop costs a step: microseconds beside the model, part by part.

    python scripts/bench_step_overhead.py [--running 1 64 256 512] [--steps 400] [--json FILE]

The core steps with the real runner, whose model is a stand-in that hands out logits made before. So
`total` is everything outside the model: scheduling, gathering the batch's tensors (`prepare`),
sampling, committing tokens, building outputs, and their way to bytes (`encode`). Every request
decodes one token a step, as in steady serving; in the setting `turnover` one request ends each step
and another begins. Figures are medians over the steps.

The goal: 256 running, greedy, a vocabulary of 4,096: at most 300 microseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from engine_core.config import SchedulerConfig
from engine_core.core import EngineCore
from engine_core.model.config import parse_model_config
from engine_core.model.parts import PartsForm
from engine_core.model.runner import TorchModelRunner
from engine_core.model.step_inputs import StepInputs
from ipc.output import encode_outputs
from ipc.request import EngineCoreRequest, SamplingParams

BLOCK_SIZE = 32
PROMPT_LENGTH = 64
SMALL_VOCAB, LARGE_VOCAB = 4_096, 151_936
GOAL = (256, "greedy", 300.0)
PARTS = ("schedule", "prepare", "sample", "commit", "outputs", "encode")

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1,
    "intermediate_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "head_dim": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
}

SAMPLINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "greedy": ({"temperature": 0.0},),
    "temperature": ({"temperature": 1.0},),
    "top-k 50, top-p 0.9": ({"temperature": 1.0, "top_k": 50, "top_p": 0.9},),
    "seeded mix": (
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.7, "top_p": 0.9, "seed": 2},
        {"temperature": 1.0, "top_k": 50, "seed": 3},
    ),
}
"""The requests of a setting take turns with these parameters."""


@dataclass(frozen=True, slots=True)
class Setting:
    num_running: int
    sampling: str
    vocab_size: int = SMALL_VOCAB
    has_turnover: bool = False


@dataclass(frozen=True, slots=True)
class StepCost:
    """Medians of one setting, in microseconds a step."""

    setting: Setting
    parts_us: dict[str, float]
    total_us: float


class StandInModel:
    """Implements what a runner asks of a decoder, at no cost."""

    def __init__(self, vocab_size: int, max_num_seqs: int) -> None:
        self.config = parse_model_config(MODEL | {"vocab_size": vocab_size})
        self._states = torch.zeros(max_num_seqs, 1)
        self._logits = 3 * torch.randn(max_num_seqs, vocab_size)

    def forward(self, inputs: StepInputs, kv_cache: object) -> Tensor:
        del kv_cache
        wanted = inputs.wanted_tokens
        return self._states[: len(inputs.token_ids) if wanted is None else len(wanted)]

    def logits(self, states: Tensor) -> Tensor:
        return self._logits[: len(states)]


class Stopwatch:
    """Adds up what wrapped functions take, by part of a step."""

    def __init__(self) -> None:
        self.taken_us: defaultdict[str, float] = defaultdict(float)

    def wrap(self, owner: object, name: str, part: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            self.taken_us[part] += (time.perf_counter() - start) * 1e6
            return result

        setattr(owner, name, timed)


def make_core(setting: Setting, num_steps: int) -> tuple[EngineCore, Stopwatch]:
    max_model_len = PROMPT_LENGTH + num_steps + 32
    num_running = setting.num_running
    config = SchedulerConfig(
        max_model_len=max_model_len,
        max_num_seqs=num_running,
        max_num_batched_tokens=num_running * PROMPT_LENGTH,
        block_size=BLOCK_SIZE,
    )
    num_blocks = (num_running + 2) * (max_model_len // BLOCK_SIZE + 1) * 2
    empty_cache = torch.empty(num_blocks, 1, BLOCK_SIZE, 1)
    runner = TorchModelRunner(
        StandInModel(setting.vocab_size, num_running),  # type: ignore[arg-type]
        [(empty_cache, empty_cache)],
        max_num_seqs=num_running,
        max_model_len=max_model_len,
        seed=0,
        form=PartsForm(dtype=torch.float32, device=torch.device("cpu")),
    )
    core, stopwatch = EngineCore(config, runner), Stopwatch()
    stopwatch.wrap(core.scheduler, "schedule", "schedule")
    stopwatch.wrap(core.scheduler, "commit", "commit")
    stopwatch.wrap(runner, "execute", "execute")
    stopwatch.wrap(runner._sampler, "sample", "sample")
    return core, stopwatch


def make_requests(setting: Setting) -> Iterator[EngineCoreRequest]:
    variants = SAMPLINGS[setting.sampling]
    for n in count():
        # With turnover, the first ones end one after the other, and so do those that replace them.
        ends_after = min(n + 12, setting.num_running) if setting.has_turnover else None
        yield EngineCoreRequest(
            request_id=f"request-{n:08}",
            prompt_token_ids=[n % SMALL_VOCAB] * PROMPT_LENGTH,
            sampling_params=SamplingParams(max_tokens=ends_after, **variants[n % len(variants)]),
        )


def measure(setting: Setting, num_steps: int) -> StepCost:
    core, stopwatch = make_core(setting, num_steps)
    requests = make_requests(setting)
    samples: dict[str, list[float]] = {part: [] for part in (*PARTS, "total")}
    for step in range(num_steps + 10):
        missing = setting.num_running - core.num_live_requests
        if missing:
            core.apply([(0, next(requests)) for _ in range(missing)], time.monotonic())
        stopwatch.taken_us.clear()
        start = time.perf_counter()
        frames = core.step(time.monotonic())
        stepped = time.perf_counter()
        for _, frame in frames:
            encode_outputs(frame)
        encoded = time.perf_counter()
        if step < 10:
            continue
        taken, step_us = stopwatch.taken_us, (stepped - start) * 1e6
        samples["schedule"].append(taken["schedule"])
        samples["prepare"].append(taken["execute"] - taken["sample"])
        samples["sample"].append(taken["sample"])
        samples["commit"].append(taken["commit"])
        samples["outputs"].append(step_us - taken["schedule"] - taken["execute"] - taken["commit"])
        samples["encode"].append((encoded - stepped) * 1e6)
        samples["total"].append((encoded - start) * 1e6)
    medians = {part: round(statistics.median(values), 1) for part, values in samples.items()}
    return StepCost(setting, medians, medians.pop("total"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 64, 256, 512])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    settings = [Setting(number, sampling) for sampling in SAMPLINGS for number in arguments.running]
    settings += [Setting(number, "greedy", has_turnover=True) for number in arguments.running]
    settings += [Setting(64, sampling, LARGE_VOCAB) for sampling in SAMPLINGS]
    columns = "".join(f"{part:>10}" for part in (*PARTS, "total µs"))
    print(f"{'running':>7} {'vocabulary':>10}  {'sampling':<22}{columns}")
    costs = []
    for setting in settings:
        cost = measure(setting, arguments.steps)
        costs.append(cost)
        name = setting.sampling + (", turnover" if setting.has_turnover else "")
        figures = "".join(f"{us:>10.1f}" for us in (*cost.parts_us.values(), cost.total_us))
        print(f"{setting.num_running:>7} {setting.vocab_size:>10}  {name:<22}{figures}", flush=True)
        if setting == Setting(*GOAL[:2]):
            print(f"{'':>20}the goal is at most {GOAL[2]:.0f} µs")
    if arguments.json:
        machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        figures_of_all = {
            "python": platform.python_version(),
            **machine,
            "costs": [asdict(cost) for cost in costs],
        }
        arguments.json.write_text(json.dumps(figures_of_all, indent=2) + "\n")


if __name__ == "__main__":
    main()
