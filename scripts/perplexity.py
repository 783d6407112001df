"""Perplexity of a model as the engine computes it, in several number formats side by side.

    python -m scripts.perplexity [--model DIRECTORY] [--text FILE ...] [--window 512]
        [--dtype bfloat16 ...] [--quantization none int8] [--json FILE]

Texts are cut into consecutive windows; the engine judges each window's tokens behind its first,
which is what `prompt_logprobs` answers. Without texts, those are taken that were held out of the
bundled model's training: a part of the running interpreter's standard library, so figures are of
one Python version.

The last row is the share of positions at which a format's likeliest token is that of the first one.
Exit status 1 if a format cannot be served.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from caesura import AsyncEngine, FrontendConfig, SamplingParams
from frontend.config import BUNDLED_MODEL_DIRECTORY
from ipc.engine_config import EngineConfig
from scripts.bundled_model.corpus import load_corpus
from scripts.http_bench.figures import print_table, write_json

CONCURRENCY = 16


@dataclass(frozen=True, slots=True)
class Judgement:
    """Of all windows, position by position."""

    logprobs: list[float]
    likeliest: list[int]

    @property
    def perplexity(self) -> float:
        return math.exp(-sum(self.logprobs) / len(self.logprobs))

    def agreement(self, other: Judgement) -> float:
        same = sum(a == b for a, b in zip(self.likeliest, other.likeliest, strict=True))
        return same / len(self.likeliest)


async def judge(engine: AsyncEngine, windows: Sequence[list[int]]) -> Judgement:
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    limit = asyncio.Semaphore(CONCURRENCY)

    async def judge_one(window: list[int]) -> list[tuple[float, int]]:
        async with limit:
            result = await engine.generate(prompt_token_ids=window, sampling_params=params).result()
        return [(entry.logprob, entry.top[0][0]) for entry in result.prompt_logprobs]

    of_windows = await asyncio.gather(*map(judge_one, windows))
    pairs = [pair for of_window in of_windows for pair in of_window]
    return Judgement([logprob for logprob, _ in pairs], [token_id for _, token_id in pairs])


async def judge_formats(options: argparse.Namespace, windows: Sequence[list[int]]) -> None:
    columns: dict[str, dict[str, float | str]] = {}
    first: Judgement | None = None
    formats = [
        (dtype, quantization) for dtype in options.dtype for quantization in options.quantization
    ]
    for dtype, quantization in formats:
        config = EngineConfig(
            model=str(options.model),
            dtype=dtype,
            quantization=None if quantization == "none" else quantization,
            enable_prefix_caching=False,
        )
        async with await AsyncEngine.start(FrontendConfig(engine=config)) as engine:
            judgement = await judge(engine, windows)
        first = first or judgement
        columns[dtype if quantization == "none" else quantization] = {
            "tokens": len(judgement.logprobs),
            "perplexity": judgement.perplexity,
            "worse than the first by, %": (judgement.perplexity / first.perplexity - 1) * 100,
            "likeliest token the same, %": judgement.agreement(first) * 100,
        }
    print_table(f"{options.model}, windows of {options.window}", columns)
    if options.json:
        write_json(options.json, {"command": sys.argv, "figures": columns})


def make_windows(tokenizer: Tokenizer, texts: Sequence[str], size: int) -> list[list[int]]:
    """Consecutive windows of `size` tokens over all texts; the rest of each text is left out."""
    windows = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        windows += [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
    return windows


def main() -> int:
    """Judge and print; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=BUNDLED_MODEL_DIRECTORY)
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--window", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--max-windows", type=int, default=200, metavar="N")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--quantization", nargs="+", default=["none", "int8"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    try:
        texts = [path.read_text() for path in options.text or ()] or load_corpus().held_out
        tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
        windows = make_windows(tokenizer, texts, options.window)[: options.max_windows]
        if not windows:
            raise ValueError(
                f"no text has {options.window} tokens; give longer ones or lower --window"
            )
        asyncio.run(judge_formats(options, windows))
    except (OSError, ValueError) as error:
        print(f"perplexity: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
