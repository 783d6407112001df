"""How time and memory grow with the context and with the number of requests: an engine's own steps.

    python -m scripts.bench_growth --model qwen3-0.6b [--contexts 1024 32768] [--requests 1 512]

The model runner steps in this process, without a scheduler and without a front end: what is
measured is the model. Contexts are made up, their keys and values filled with one number, so a long
one need not be computed first. Three curves:

- decode, one request, by its context;
- a prompt's next 512 tokens, behind a context;
- decode, requests of 128 tokens of context each, by their number.

Figures: milliseconds a step (the median over some) and tokens a second; the gigabytes that a step
reads at least (all packed weights, and the keys and values of its contexts), and how many of them a
second, which shows where memory bounds a curve and where arithmetic does; and the process's
resident memory, with the keys and values of these contexts and nothing else in the cache.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from engine_core.batch import JoinedSequence, StepBatch
from engine_core.model.cpu_linear import PackedLinear
from engine_core.model.loader import load_runner
from engine_core.model.runner import TorchModelRunner
from ipc.engine_config import EngineConfig
from ipc.request import SamplingParams
from scripts.http_bench.figures import print_table, write_json
from scripts.http_bench.processes import resident_bytes
from scripts.perf_bench.command_line import find_model, make_parser
from scripts.perf_bench.machine import describe_machine

CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTEXT_OF_MANY = 128
CHUNK = 512
BLOCK_SIZE = 32
WARM_UP_STEPS = 2

Figures = dict[str, float | str]


class Stepper:
    """A loaded model, and steps over contexts that were never computed."""

    def __init__(self, directory: Path, contexts: Sequence[int], requests: Sequence[int]) -> None:
        longest = max(*contexts, CONTEXT_OF_MANY) + CHUNK
        of_many = max(requests) * blocks_of(CONTEXT_OF_MANY + 1)
        config = EngineConfig(
            model=str(directory),
            device="cpu",
            max_model_len=longest + 1,
            max_num_seqs=max(requests),
            num_gpu_blocks_override=max(blocks_of(longest), of_many),
            block_size=BLOCK_SIZE,
        )
        self.runner: TorchModelRunner
        self.runner, _ = load_runner(config)
        self.runner.bind_thread()
        linears = self.runner.model.parts.linears.values()
        packed = [linear.packed for linear in linears if isinstance(linear, PackedLinear)]
        self.weight_bytes = sum(weight.numbers.nbytes for weight in packed)
        caches = [cache for layer in self.runner.kv_cache for cache in layer]
        self.bytes_per_token = sum(cache[0].nbytes for cache in caches) // BLOCK_SIZE

    def measure(self, num_requests: int, num_tokens: int, context: int, steps: int) -> Figures:
        """Steps in which each request computes its next `num_tokens` tokens behind a context."""
        blocks_each = blocks_of(context + num_tokens)
        with torch.inference_mode():
            for cache in (cache for layer in self.runner.kv_cache for cache in layer):
                cache[: num_requests * blocks_each] = 0.01
        joined = [
            JoinedSequence(
                slot=slot,
                token_ids=[slot % 1000] * (context + num_tokens),
                num_prompt_tokens=context + num_tokens,
                block_ids=list(range(slot * blocks_each, (slot + 1) * blocks_each)),
                sampling=SamplingParams(temperature=0.0),
            )
            for slot in range(num_requests)
        ]
        rows = [(slot, num_tokens, context, True) for slot in range(num_requests)]
        self.runner.execute(StepBatch(joined=joined).with_rows(rows))
        times_s = []
        for _ in range(WARM_UP_STEPS + steps):
            begin_s = time.perf_counter()
            self.runner.execute(StepBatch().with_rows(rows))
            times_s.append(time.perf_counter() - begin_s)
        self.runner.execute(StepBatch(left=list(range(num_requests))))
        step_s = median(times_s[WARM_UP_STEPS:])
        read_bytes = self.weight_bytes + num_requests * context * self.bytes_per_token
        return {
            "ms a step": step_s * 1e3,
            "tokens/s": num_requests * num_tokens / step_s,
            "GB read": read_bytes / 1e9,
            "GB/s": read_bytes / 1e9 / step_s,
            "resident MiB": resident_bytes([os.getpid()]) / 2**20,
        }


def blocks_of(num_tokens: int) -> int:
    """Of the cache, for a sequence of so many tokens and the one that is sampled next."""
    return num_tokens // BLOCK_SIZE + 1


def main() -> int:
    """Measure; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--requests", type=int, nargs="+", default=REQUESTS)
    parser.add_argument("--steps", type=int, default=7, help="of each figure (default 7)")
    arguments = parser.parse_args()
    if min(*arguments.contexts, *arguments.requests, arguments.steps) < 1:
        parser.error("--contexts, --requests and --steps take numbers of at least 1")
    stepper = Stepper(find_model(parser, arguments), arguments.contexts, arguments.requests)
    steps, curves = arguments.steps, {}
    # Requests first: resident memory only grows.
    for title, points in {
        f"decode, requests with a context of {CONTEXT_OF_MANY}": [
            (str(number), (number, 1, CONTEXT_OF_MANY)) for number in sorted(arguments.requests)
        ],
        "decode, one request, by its context": [
            (str(context), (1, 1, context)) for context in sorted(arguments.contexts)
        ],
        f"a prompt's next {CHUNK} tokens, by the context before them": [
            (str(context), (1, CHUNK, context)) for context in sorted(arguments.contexts)
        ],
    }.items():
        curves[title] = {label: stepper.measure(*point, steps) for label, point in points}
        print_table(title, curves[title])
    if arguments.json is not None:
        write_json(arguments.json, describe_machine() | {"curves": curves})
    return 0


if __name__ == "__main__":
    sys.exit(main())
