"""Receipts of aborts under load: how soon they come, and whether what they say has happened.

    python -m scripts.bench_receipts

A server with the bundled model has 64 streams running; who ends is replaced. One request after the
other is aborted by its id, at random moments, and then all of them, several times. The engine
computes with one thread, as server and clients need a core too. A receipt's time is from the call
to its answer, over HTTP.

The goal is one step plus 2 ms: the step in flight keeps its blocks to its end. So each receipt is
also held against its own step, the longest that another stream saw end while the receipt was
awaited (or the one in which it came). `steps` counts the ends that it saw: 1 is what is promised,
and 2 may be seen if the call was made while the tokens of a step were on their way to the client.

What a receipt says is not believed: at once after it, `/requests` must not name the request, and
the blocks that `/v1/status` says are held must be no more than what the other streams can need for
the tokens that they have. `blocks beyond need` is by how many there were more, at most; `would have
shown` counts the receipts after which blocks that had not left would have been too many.

The exit status is 1 unless every row of the second table is 0. Linux only.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from statistics import median

import uvloop

from scripts.control_bench.client import Answer, Control, TokenStream
from scripts.control_bench.crowd import Crowd
from scripts.control_bench.server import Books, own_server
from scripts.http_bench.figures import percentile, print_table, write_json
from scripts.http_bench.servers import make_parser

BLOCK_SIZE = 32
AHEAD_TOKENS = 2
"""By so many an engine may be ahead of what a client has read: one on its way, one in the step."""
SETTLE_S = 0.1
"""Over several sockets, what was sent before a receipt may be read a little after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """One call, and what was seen at once after its answer."""

    victims: list[TokenStream]
    """Streams that ran when it was made."""
    others: list[TokenStream]
    """Streams that were live afterwards."""
    witness: TokenStream | None
    """A stream that went on."""
    receipt: Answer
    listed: frozenset[str]
    """The ids of `/requests`."""
    books: Books
    seen_s: float
    """When both had been read."""

    def steps_s(self) -> list[float]:
        """The durations of the steps whose end the witness saw during the wait, or of the one that
        the wait was within; none if it ended too early to tell.
        """
        events = [] if self.witness is None else self.witness.received.events
        arrivals_s = [event.arrived_s for event in events]
        first = bisect(arrivals_s, self.receipt.sent_s)
        end = max(bisect(arrivals_s, self.receipt.end_s), first + 1)
        if not 0 < first < end <= len(arrivals_s):
            return []
        return [after - before for before, after in pairwise(arrivals_s[first - 1 : end])]

    @property
    def num_blocks(self) -> int:
        """That left the victims, as the receipt says."""
        told = self.receipt.checked()
        return int(told["num_blocks_freed"]) + int(told["num_blocks_cached"])

    def num_needed_blocks(self) -> int:
        """The most that the others can hold."""
        most_tokens = [
            len(stream.prompt) + stream.received.num_tokens_before(self.seen_s) + AHEAD_TOKENS
            for stream in self.others
        ]
        return sum(ceil(num_tokens / BLOCK_SIZE) for num_tokens in most_tokens)


async def abort_one(crowd: Crowd, port: int, chance: random.Random) -> Abort:
    victim, witness = chance.sample(crowd.running(), 2)
    return await _abort(crowd, port, {"request_id": victim.name}, [victim], witness)


async def abort_all(crowd: Crowd, port: int) -> Abort:
    return await _abort(crowd, port, {"abort_all": True}, crowd.running(), None)


async def _abort(
    crowd: Crowd,
    port: int,
    selector: dict[str, object],
    victims: list[TokenStream],
    witness: TokenStream | None,
) -> Abort:
    controls = await asyncio.gather(Control.open(port), Control.open(port))
    receipt = await controls[0].post("/v1/abort", selector)
    status, requests = await asyncio.gather(
        controls[0].get("/v1/status"), controls[1].get("/requests")
    )
    for control in controls:
        control.close()
    return Abort(
        victims=victims,
        others=[stream for stream in crowd.live.values() if stream not in victims],
        witness=witness,
        receipt=receipt,
        listed=frozenset(one["request_id"] for one in requests.checked()["requests"]),
        books=Books.of(status),
        seen_s=max(status.end_s, requests.end_s),
    )


@dataclass(slots=True)
class Run:
    """What was measured."""

    singles: list[Abort]
    alls: list[Abort]
    streams: list[TokenStream]
    """All that there were."""


async def measure(port: int, num_streams: int, num_singles: int, num_alls: int) -> Run:
    chance = random.Random(num_singles)
    singles, alls = [], []
    async with Crowd.gathered(port, num_streams) as crowd:
        for _ in range(num_singles):
            await asyncio.sleep(chance.uniform(0.03, 0.08))
            singles.append(await abort_one(crowd, port, chance))
        for _ in range(num_alls):
            await crowd.all_running()
            await asyncio.sleep(chance.uniform(0.3, 0.6))
            alls.append(await abort_all(crowd, port))
        streams = [*crowd.ended, *crowd.live.values()]
    await asyncio.sleep(SETTLE_S)
    return Run(singles, alls, streams)


def figures_of(aborts: Sequence[Abort], streams: Sequence[TokenStream]) -> dict[str, float]:
    begin_s, end_s = aborts[0].receipt.sent_s, aborts[-1].receipt.end_s
    gaps_s = [gap for stream in streams for gap in stream.received.gaps_s(begin_s, end_s)]
    receipts_s = [abort.receipt.took_s for abort in aborts]
    awaited = [(abort.receipt.took_s, steps_s) for abort in aborts if (steps_s := abort.steps_s())]
    beyond_s = [took_s - max(steps_s) for took_s, steps_s in awaited]
    slack = [abort.num_needed_blocks() - abort.books.num_blocks_held for abort in aborts]
    blocks = [abort.num_blocks for abort in aborts]
    return {
        "receipts": len(aborts),
        "receipt after, p50 ms": percentile(receipts_s, 50) * 1e3,
        "receipt after, p99 ms": percentile(receipts_s, 99) * 1e3,
        "receipt after, max ms": percentile(receipts_s, 100) * 1e3,
        "step, p50 ms": percentile(gaps_s, 50) * 1e3,
        "step, p99 ms": percentile(gaps_s, 99) * 1e3,
        "beyond its own step, p50 ms": percentile(beyond_s, 50) * 1e3,
        "beyond its own step, p99 ms": percentile(beyond_s, 99) * 1e3,
        "steps, p50": percentile([len(steps_s) for _, steps_s in awaited], 50),
        "steps, max": percentile([len(steps_s) for _, steps_s in awaited], 100),
        "requests ended by one": median(abort.receipt.checked()["num_aborted"] for abort in aborts),
        "blocks returned by one": median(blocks),
        "blocks beyond need, most": max(-each for each in slack),
        "would have shown": sum(one > each for one, each in zip(blocks, slack, strict=True)),
    }


def faults_of(aborts: Sequence[Abort]) -> dict[str, int]:
    """What should not have happened; all 0."""
    return {
        "victims still listed": sum(
            victim.name in abort.listed for abort in aborts for victim in abort.victims
        ),
        "blocks still held": sum(
            abort.books.num_blocks_held > abort.num_needed_blocks() for abort in aborts
        ),
        "ends not as the receipt says": sum(
            not _is_as_told(abort, victim) for abort in aborts for victim in abort.victims
        ),
        "ends after the receipt": sum(
            victim.connection.reply.end_s > abort.receipt.end_s + SETTLE_S
            for abort in aborts
            for victim in abort.victims
        ),
        "errors in the books": sum(len(abort.books.integrity_errors) for abort in aborts),
    }


def _is_as_told(abort: Abort, victim: TokenStream) -> bool:
    """A victim that ends by itself just before may be unknown to the receipt."""
    told = abort.receipt.checked()["requests"].get(victim.name, {"status": "unknown"})
    received = victim.received
    if received.finish_reason == "length":
        return received.is_whole and told["status"] in ("finished", "unknown")
    return (
        received.is_whole
        and (received.finish_reason, told["status"]) == ("abort", "aborted")
        and told["num_output_tokens"] == len(received.token_ids)
    )


def main() -> int:
    """Measure; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--streams", type=int, default=64, help="that run (default 64)")
    parser.add_argument("--aborts", type=int, default=300, help="by id (default 300)")
    parser.add_argument("--aborts-of-all", type=int, default=10, help="(default 10)")
    arguments = parser.parse_args()
    flags = ("--max-num-seqs", str(arguments.streams), "--block-size", str(BLOCK_SIZE))
    with own_server(*flags, "--num-threads", "1", model=arguments.model) as server:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            run = runner.run(
                measure(server.port, arguments.streams, arguments.aborts, arguments.aborts_of_all)
            )
    aborts = {"one by id": run.singles, "all at once": run.alls}
    figures = {name: figures_of(of_kind, run.streams) for name, of_kind in aborts.items()}
    faults = {name: faults_of(of_kind) for name, of_kind in aborts.items()}
    print_table(f"caesura: receipts amid {arguments.streams} running streams", figures)
    print_table("caesura: what must not happen", faults)
    if arguments.json is not None:
        write_json(arguments.json, {"cores": os.cpu_count(), "figures": figures, "faults": faults})
    return 1 if any(any(of_kind.values()) for of_kind in faults.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
