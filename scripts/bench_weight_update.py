"""New weights amid 32 live requests: how long they stand still, and whose weights made each token.

    python -m scripts.bench_weight_update

The bundled model's weights are exchanged for others (the same with seeded noise) and back, from a
directory and as a safetensors file in the call's body, and requests are kept, retracted or aborted
meanwhile. The goal is one step plus 50 ms of standing still; staging is not part of it, since
requests run on meanwhile. `longest gap` is what a client sees between two tokens
around the change; behind a retraction it has the recomputation in it.

Afterwards transformers judges, with the weights of each span, the tokens of each kind's last
update: those of the streams, and those of the same prompts sent once more, whose KV of the old
weights was cached. `sharp spans` of the streams are those where a boundary that was one token off
would have shown. The exit status is 1 unless every row of the second table is 0. Linux only.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import get_args

import uvloop

from ipc.pause import PauseMode
from scripts.control_bench.reference import Reference, save_other_weights
from scripts.control_bench.server import own_server
from scripts.control_bench.update_life import (
    LATER_TOKENS,
    Transport,
    UpdateLife,
    has_right_spans,
    judge,
    spans,
    update,
)
from scripts.http_bench.figures import percentile, print_table, write_json
from scripts.http_bench.servers import make_parser

NOISE = 2.0
"""In a matrix's standard deviations: enough that the two models seldom agree on a token."""
MODES: tuple[PauseMode, ...] = ("keep", "retract", "abort")
AFTER_S = 0.5
"""So long after the answer a stream may still feel the update."""


def figures_of(lives: Sequence[UpdateLife]) -> dict[str, float]:
    """Medians of one kind, and the worst of what has a goal."""
    told = [life.call.checked() for life in lives]
    steps_s = [_percentile(life, 50, 0.0, life.call.sent_s) for life in lives]
    stills_s = [one["paused_s"] for one in told]
    beyond_s = [still_s - step_s for still_s, step_s in zip(stills_s, steps_s, strict=True)]
    return {
        "step before it, p50 ms": median(steps_s) * 1e3,
        "staged in, ms": median(one["staging_s"] for one in told) * 1e3,
        "ITL meanwhile, p99 ms": median(
            _percentile(life, 99, life.call.sent_s, life.committed_s) for life in lives
        )
        * 1e3,
        "stood still for, ms": median(stills_s) * 1e3,
        "stood still for, max ms": max(stills_s) * 1e3,
        "beyond a step, max ms": max(beyond_s) * 1e3,
        "longest gap, ms": median(
            _percentile(life, 100, life.committed_s, life.call.end_s + AFTER_S) for life in lives
        )
        * 1e3,
        "whole call, ms": median(life.call.took_s for life in lives) * 1e3,
        "tensors": told[0]["num_tensors"],
        "MB": told[0]["num_bytes"] / 1e6,
    }


def faults_of(lives: Sequence[UpdateLife], num_tokens: int) -> dict[str, int]:
    """What should not have happened; all 0."""
    streams = [(life, stream) for life in lives for stream in life.streams]
    later = [(life, stream) for life in lives for stream in life.later]
    return {
        "streams not counted out": sum(not s.received.is_whole for _, s in streams + later),
        "streams not as the mode says": sum(
            (s.received.finish_reason, len(s.received.token_ids) == num_tokens)
            != (("abort", False) if life.mode == "abort" else ("length", True))
            for life, s in streams
        ),
        "spans not old, then new": sum(not has_right_spans(life, s) for life, s in streams),
        "later spans not new": sum(
            spans(s) != [{"version": life.new, "start": 0, "end": LATER_TOKENS}]
            for life, s in later
        ),
        "versions not as asked": sum(life.call.checked()["version"] != life.new for life in lives),
        "not idle at the end": sum(not life.after.is_idle for life in lives),
    }


@dataclass(frozen=True, slots=True)
class Judgement:
    """By transformers, of one update."""

    num_judged: int
    """Streams that crossed it."""
    num_sharp: int
    num_wrong: int
    num_wrong_later: int


def judgement_of(life: UpdateLife, old: Reference, new: Reference) -> Judgement:
    judged = [stream for stream in life.streams if has_right_spans(life, stream)]
    verdicts = [judge(life, stream, old, new) for stream in judged]
    return Judgement(
        num_judged=len(verdicts),
        num_sharp=sum(verdict.is_sharp for verdict in verdicts),
        num_wrong=sum(verdict.num_wrong for verdict in verdicts),
        num_wrong_later=sum(
            sum(new.errors(stream.prompt, stream.received.token_ids)) for stream in life.later
        ),
    )


def _percentile(life: UpdateLife, percent: float, begin_s: float, end_s: float) -> float:
    """Of all streams' inter-token latencies in a window, in seconds."""
    gaps_s = [gap for stream in life.streams for gap in stream.received.gaps_s(begin_s, end_s)]
    return percentile(gaps_s, percent)


async def measure(
    port: int, weights: Sequence[Path], *, num_streams: int, num_tokens: int, num_repeats: int
) -> list[tuple[str, UpdateLife]]:
    """Updates and their kinds, each to the other one of two weights."""
    kinds = list(product(MODES, get_args(Transport)))
    return [
        (
            f"{mode}/{transport}",
            await update(
                port,
                mode,
                transport,
                weights[number % 2],
                number=number,
                num_streams=num_streams,
                num_tokens=num_tokens,
            ),
        )
        for number, (_, (mode, transport)) in enumerate(product(range(num_repeats), kinds), start=1)
    ]


def main() -> int:
    """Measure; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="of each kind (default 5)")
    parser.add_argument("--streams", type=int, default=32, help="live requests (default 32)")
    parser.add_argument("--tokens", type=int, default=200, help="of each (default 200)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = Path(arguments.model)
        other = save_other_weights(model, Path(directory) / "other", seed=1, noise=NOISE)
        weights = [model, other]
        with own_server("--max-num-seqs", str(arguments.streams), model=arguments.model) as server:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                updates = runner.run(
                    measure(
                        server.port,
                        weights,
                        num_streams=arguments.streams,
                        num_tokens=arguments.tokens,
                        num_repeats=arguments.repeats,
                    )
                )
        references = [Reference(each) for each in weights]
    lives: defaultdict[str, list[UpdateLife]] = defaultdict(list)
    for kind, life in updates:
        lives[kind].append(life)
    figures = {kind: figures_of(of_kind) for kind, of_kind in lives.items()}
    faults = {kind: faults_of(of_kind, arguments.tokens) for kind, of_kind in lives.items()}
    for kind, of_kind in lives.items():
        last = of_kind[-1]
        judgement = judgement_of(last, references[1 - last.number % 2], references[last.number % 2])
        figures[kind] |= {"judged": judgement.num_judged, "sharp spans": judgement.num_sharp}
        faults[kind] |= {
            "tokens not their version's": judgement.num_wrong,
            "later tokens not the new's": judgement.num_wrong_later,
        }
    print_table(f"caesura: new weights amid {arguments.streams} live requests", figures)
    print_table("caesura: what must not happen", faults)
    if arguments.json is not None:
        settings = {"cores": os.cpu_count(), "repeats": arguments.repeats}
        write_json(arguments.json, {**settings, "figures": figures, "faults": faults})
    return 1 if any(any(of_kind.values()) for of_kind in faults.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
