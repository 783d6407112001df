"""A pause amid a load, in each mode: how soon it holds, and what becomes of every request.

    python -m scripts.bench_pause

The scene is that of FastDeploy's pull request 7753: a server that runs 8 sequences at a time has
20 streams, so that 12 wait. It is paused at a random moment; further requests come while it drains
and while it is paused; it is resumed, and 5 long requests follow. (FastDeploy tells 0.342 s until
its pause holds, and answers newcomers with errors.) Here newcomers are held in one half of the
lives and rejected in the other.

Server, engine and model run as always; the clients read real HTTP streams and `/v1/status`, and
transformers judges the tokens of each kind's last life afterwards. `draining` of the mode `wait`
takes as long as the requests that had begun. The exit status is 1 unless every row of the second
table is 0. Linux only.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import product
from math import nan
from pathlib import Path
from statistics import median
from typing import get_args

import uvloop

from ipc.pause import PauseMode
from scripts.control_bench.client import TokenStream
from scripts.control_bench.pause_life import NEWCOMER_TOKENS, Life, NewcomerRule, Scene, live
from scripts.control_bench.reference import Reference
from scripts.control_bench.server import own_server
from scripts.http_bench.figures import percentile, print_table, totals, write_json
from scripts.http_bench.servers import make_parser

NUM_NEWCOMERS = 3
"""While it drains, and as many while it is paused."""
SETTLE_S = 0.1
"""Over several sockets, what was sent before the pause's answer may be read a little after it."""
ACCEPTED = "caesura_requests_accepted_total"
FINISHED = "caesura_requests_finished_total"
INTEGRITY = "caesura_integrity_violations_total"


def figures_of(lives: Sequence[Life]) -> dict[str, float | str]:
    """What a mode's lives were like: medians, and the worst of the pause itself."""
    pauses_s = [life.pause.took_s for life in lives]
    told = [life.pause.checked() for life in lives]
    held = [life for life in lives if life.rule == "hold"]
    rejected = [life for life in lives if life.rule == "reject"]
    return {
        "step before it, p50 ms": median(_step_s(life) for life in lives) * 1e3,
        "pause answered after, ms": median(pauses_s) * 1e3,
        "the longest of all, ms": max(pauses_s) * 1e3,
        "tokens at the pause": _counts(_tokens_at_pause(lives[-1])),
        "ended by it": median(one["num_aborted"] for one in told),
        "frozen by it": median(one["num_kept"] for one in told),
        "retracted by it": median(one["num_retracted"] for one in told),
        "blocks": lives[0].before.num_blocks,
        "held by requests before": median(life.before.num_blocks_held for life in lives),
        "held while paused": median(life.still.num_blocks_held for life in lives),
        "held at the end": median(life.after.num_blocks_held for life in lives),
        "newcomers held": _median(life.still.num_held for life in held),
        "newcomers rejected": _median(
            sum(stream.received.status == 503 for stream in life.newcomers) for life in rejected
        ),
        "resume answered after, ms": median(life.resume.took_s for life in lives) * 1e3,
        "next token after, ms": _median(map(_first_after_s, lives)) * 1e3,
        "long requests after it": median(len(life.later) for life in lives),
    }


def faults_of(life: Life, scene: Scene) -> dict[str, float]:
    """What should not have happened; all 0."""
    everybody = [*life.streams, *life.newcomers, *life.later]
    accepted = [stream for stream in everybody if stream.received.status == 200]
    num_accepted, num_ended = _risen(life, ACCEPTED), _risen(life, FINISHED)
    return {
        "streams not counted out": sum(not one.received.is_whole for one in accepted),
        "ends not exactly one": sum(len(one.received.endings) != 1 for one in accepted),
        "streams not as the mode says": sum(
            not _is_as_said(life, stream, scene) for stream in life.streams
        ),
        "newcomers not as the rule says": sum(
            not _is_treated(life.rule, stream) for stream in life.newcomers
        ),
        "long requests not in full": sum(
            not _is_full(stream, scene.num_later_tokens) for stream in life.later
        ),
        "tokens while paused": sum(
            one.received.num_tokens_before(life.resume.sent_s)
            - one.received.num_tokens_before(life.pause.end_s + SETTLE_S)
            for one in [*life.streams, *life.newcomers]
        ),
        "steps while paused": life.still.num_steps - life.paused.num_steps,
        "blocks not given up": life.paused.num_blocks_held if life.mode != "keep" else 0,
        "frozen without blocks": life.mode == "keep" and not life.still.num_blocks_held,
        "not idle at the end": not life.after.is_idle,
        "probes not 503 and 200": life.probes != (503, 200),
        "accepted and not ended": abs(num_accepted - num_ended) + abs(num_accepted - len(accepted)),
        "errors in the books": _risen(life, INTEGRITY),
    }


def judge(lives: Sequence[Life], reference: Reference) -> int:
    """How many tokens of the last life of each rule are not the model's."""
    return sum(
        sum(reference.errors(stream.prompt, stream.received.token_ids))
        for life in {life.rule: life for life in lives}.values()
        for stream in [*life.streams, *life.newcomers, *life.later]
    )


def _is_as_said(life: Life, stream: TokenStream, scene: Scene) -> bool:
    """Whether a stream from before the pause ended as its mode says."""
    received = stream.received
    if life.mode != "abort":
        return _is_full(stream, scene.num_tokens)
    resume_from = received.resume_from or {}
    return (
        received.finish_reason == "abort"
        and received.endings[0]["abort_cause"] == "pause"
        and resume_from.get("output_token_ids") == received.token_ids
        and resume_from.get("prompt_token_ids") == stream.prompt
        and stream.connection.reply.end_s <= life.pause.end_s + SETTLE_S
    )


def _is_treated(rule: NewcomerRule, stream: TokenStream) -> bool:
    if rule == "hold":
        return _is_full(stream, NEWCOMER_TOKENS)
    received = stream.received
    return (
        received.status == 503
        and not received.token_ids
        and received.errors[0]["error"]["code"] == "engine_paused"
    )


def _is_full(stream: TokenStream, num_tokens: int) -> bool:
    received = stream.received
    return received.finish_reason == "length" and len(received.token_ids) == num_tokens


def _step_s(life: Life) -> float:
    gaps_s = [gap for s in life.streams for gap in s.received.gaps_s(end_s=life.pause.sent_s)]
    return percentile(gaps_s, 50)


def _tokens_at_pause(life: Life) -> list[int]:
    return [stream.received.num_tokens_before(life.resume.sent_s) for stream in life.streams]


def _counts(numbers: Sequence[int]) -> str:
    """Like "8x41-43, 12x0"."""
    begun = sorted(number for number in numbers if number)
    parts = [f"{len(begun)}x{begun[0]}-{begun[-1]}"] if begun else []
    if num_others := len(numbers) - len(begun):
        parts.append(f"{num_others}x0")
    return ", ".join(parts)


def _median(values: Iterable[float]) -> float:
    """Of those that are there; NaN for none."""
    return median(known) if (known := [value for value in values if value == value]) else nan


def _first_after_s(life: Life) -> float:
    """From the resume to the next token of anybody that waited for it."""
    begin_s = life.resume.sent_s
    waited = (*life.streams, *life.newcomers)
    arrivals_s = [event.arrived_s for stream in waited for event in stream.received.events]
    return min((at_s - begin_s for at_s in arrivals_s if at_s >= begin_s), default=nan)


def _risen(life: Life, name: str) -> float:
    """How much a counter rose, over all its labels."""
    return sum(value for series, value in life.counters.items() if series.partition("{")[0] == name)


async def measure(port: int, scene: Scene, num_repeats: int) -> dict[str, list[Life]]:
    """Lives by mode, in turns, so that all modes have the same noise."""
    kinds: list[tuple[PauseMode, NewcomerRule]] = list(
        product(get_args(PauseMode), get_args(NewcomerRule))
    )
    lives: defaultdict[str, list[Life]] = defaultdict(list)
    for number, (_, (mode, rule)) in enumerate(product(range(num_repeats), kinds)):
        lives[mode].append(await live(port, scene, mode, rule, number))
    return lives


def main() -> int:
    """Measure; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="of each mode and rule (default 3)")
    parser.add_argument("--streams", type=int, default=20, help="at the pause (default 20)")
    parser.add_argument("--running", type=int, default=8, help="of them, at a time (default 8)")
    parser.add_argument("--tokens", type=int, default=300, help="of a stream (default 300)")
    parser.add_argument("--later", type=int, default=5, help="long requests after it (default 5)")
    parser.add_argument("--later-tokens", type=int, default=400, help="of each (default 400)")
    arguments = parser.parse_args()
    scene = Scene(
        num_running=arguments.running,
        num_streams=arguments.streams,
        num_tokens=arguments.tokens,
        num_newcomers=NUM_NEWCOMERS,
        num_later=arguments.later,
        num_later_tokens=arguments.later_tokens,
    )
    with own_server("--max-num-seqs", str(scene.num_running), model=arguments.model) as server:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            lives = runner.run(measure(server.port, scene, arguments.repeats))
    reference = Reference(Path(arguments.model))
    figures = {mode: figures_of(of_mode) for mode, of_mode in lives.items()}
    faults = {
        mode: totals([faults_of(life, scene) for life in of_mode])
        | {"tokens not the model's": judge(of_mode, reference)}
        for mode, of_mode in lives.items()
    }
    print_table(f"caesura: a pause amid {scene.num_streams} streams", figures)
    print_table("caesura: what must not happen", faults)
    if arguments.json is not None:
        tokens = {mode: list(map(_tokens_at_pause, of_mode)) for mode, of_mode in lives.items()}
        write_json(
            arguments.json,
            {
                "cores": os.cpu_count(),
                "repeats": arguments.repeats,
                "figures": figures,
                "faults": faults,
                "tokens_at_the_pause": tokens,
            },
        )
    return 1 if any(any(of_mode.values()) for of_mode in faults.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
