"""What the engine's own loop costs a step: microseconds beside the model, by running requests.

    python scripts/bench_step_overhead.py [--running 1 64 256] [--steps 400] [--json FILE]

The core runs with the fake runner, whose arithmetic is timed apart, so `core` is what scheduling,
committing tokens and building outputs cost; `encode` is the outputs frame's way to bytes. Every
request decodes one token a step, as in steady serving. Figures are medians over the steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from engine_core.batch import StepBatch, StepResult
from engine_core.config import SchedulerConfig
from engine_core.core import EngineCore
from engine_core.fake_runner import FakeRunner
from ipc.output import encode_outputs
from ipc.request import EngineCoreRequest, SamplingParams

BLOCK_SIZE = 32
PROMPT_LENGTH = 64


@dataclass(frozen=True, slots=True)
class StepCost:
    """Medians of one setting, in microseconds a step."""

    num_running: int
    core_us: float
    runner_us: float
    encode_us: float


class TimedRunner(FakeRunner):
    """A fake runner that keeps its own time apart."""

    last_us = 0.0

    def execute(self, batch: StepBatch) -> StepResult:
        start = time.perf_counter()
        result = super().execute(batch)
        self.last_us = (time.perf_counter() - start) * 1e6
        return result


def measure(num_running: int, num_steps: int) -> StepCost:
    max_model_len = PROMPT_LENGTH + num_steps + 32
    num_blocks = num_running * (max_model_len // BLOCK_SIZE + 1)
    config = SchedulerConfig(
        max_model_len=max_model_len,
        max_num_seqs=num_running,
        max_num_batched_tokens=num_running * PROMPT_LENGTH,
        block_size=BLOCK_SIZE,
    )
    runner = TimedRunner(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=num_running,
        max_model_len=max_model_len,
    )
    core = EngineCore(config, runner)
    prompts = [[number] * PROMPT_LENGTH for number in range(num_running)]
    sampling = SamplingParams(max_tokens=None)
    requests = [
        (
            0,
            EngineCoreRequest(
                request_id=f"request-{n}", prompt_token_ids=p, sampling_params=sampling
            ),
        )
        for n, p in enumerate(prompts)
    ]
    core.apply(requests, 0.0)
    for _ in range(10):
        core.step(time.monotonic())
    core_us, runner_us, encode_us = [], [], []
    for _ in range(num_steps):
        start = time.perf_counter()
        frames = core.step(time.monotonic())
        stepped = time.perf_counter()
        for _, frame in frames:
            encode_outputs(frame)
        encoded = time.perf_counter()
        core_us.append((stepped - start) * 1e6 - runner.last_us)
        runner_us.append(runner.last_us)
        encode_us.append((encoded - stepped) * 1e6)
    medians = [statistics.median(values) for values in (core_us, runner_us, encode_us)]
    return StepCost(num_running, *(round(value, 1) for value in medians))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    costs = [measure(number, arguments.steps) for number in arguments.running]
    print(f"{'running':>8} {'core µs':>9} {'fake runner µs':>15} {'encode µs':>10}")
    for cost in costs:
        print(
            f"{cost.num_running:>8} {cost.core_us:>9.1f} "
            f"{cost.runner_us:>15.1f} {cost.encode_us:>10.1f}"
        )
    if arguments.json:
        machine = {"machine": platform.processor() or platform.machine()}
        figures = {"python": platform.python_version(), **machine}
        figures_with_costs = {**figures, "costs": [asdict(cost) for cost in costs]}
        arguments.json.write_text(json.dumps(figures_with_costs, indent=2) + "\n")


if __name__ == "__main__":
    main()
