"""Four ways in which requests end early in real life, and what becomes of their tokens.

    python scripts/examples/abort_scenarios.py

Each scenario is a function of its own and leaves the engine idle. A request that nobody reads any
more is *dropped*: its stream is closed, and the engine hears of it within milliseconds. One whose
tokens are still wanted is *aborted*: its stream ends with `finish_reason="abort"` and everything
that was generated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import islice
from typing import Any

from caesura import AsyncEngine, FrontendConfig, RequestOutput, RequestResult, SamplingParams

Prompt = dict[str, Any]
"""`{"prompt": text}` or `{"prompt_token_ids": [...]}`."""
LONG = SamplingParams(max_tokens=4000, ignore_eos=True)


async def clients_hang_up(engine: AsyncEngine, prompt: Prompt, num_clients: int = 20) -> int:
    """Every second client goes away after its first token; returns how many were served in full."""

    async def serve(client: int) -> bool:
        stream = engine.generate(**prompt, sampling_params=SamplingParams(max_tokens=20))
        async for output in stream:
            if client % 2 == 0:
                stream.close()  # This is all it takes; leaving an `async with stream:` does it too.
                return False
            if output.finish_reason is not None:
                return True
        raise AssertionError("a stream ends with a finish reason")

    served = await asyncio.gather(*(serve(client) for client in range(num_clients)))
    return sum(served)


async def deadline_passes(
    engine: AsyncEngine, prompt: Prompt, deadline_s: float = 0.3
) -> RequestResult:
    """At the deadline the request is aborted, and what it has by then is the answer."""
    stream = engine.generate(**prompt, sampling_params=LONG, request_id="with-deadline")
    reading = asyncio.create_task(stream.result())
    # Not `wait_for`: its cancellation would drop the stream, and with it the partial answer.
    _, late = await asyncio.wait([reading], timeout=deadline_s)
    if late:
        await engine.abort("with-deadline")
    return await reading


async def user_presses_stop(
    engine: AsyncEngine, prompt: Prompt, after_tokens: int = 10
) -> list[RequestOutput]:
    """A chat window shows the tokens as they come; the stop button is another task."""
    stop_button = asyncio.Event()

    async def watch_stop_button() -> None:
        await stop_button.wait()
        await engine.abort(prefix="chat-7/")  # All requests of this chat.

    watching = asyncio.create_task(watch_stop_button())
    shown: list[RequestOutput] = []
    async for output in engine.generate(**prompt, sampling_params=LONG, request_id="chat-7/turn-1"):
        shown.append(output)
        if num_tokens(shown) >= after_tokens:
            stop_button.set()
    await watching
    return shown


def num_tokens(outputs: Sequence[RequestOutput]) -> int:
    return sum(len(output.token_ids) for output in outputs)


async def batch_is_cut_at_80_percent(
    engine: AsyncEngine, prompt: Prompt, num_requests: int = 25
) -> list[RequestResult]:
    """A rollout batch does not wait for its stragglers: the last fifth returns what it has."""
    # Every fifth request would run on long after the others.
    lengths = [4000 if index % 5 == 0 else 5 + index for index in range(num_requests)]
    streams = [
        engine.generate(
            **prompt, sampling_params=SamplingParams(max_tokens=length, ignore_eos=True)
        )
        for length in lengths
    ]
    reading = [asyncio.create_task(stream.result()) for stream in streams]
    for finished in islice(asyncio.as_completed(reading), num_requests * 4 // 5):
        await finished
    receipt = await engine.abort(abort_all=True)
    print(
        f"abort-all ended {receipt.num_aborted} requests, freed {receipt.num_blocks_freed} blocks"
    )
    return [await task for task in reading]


async def run(engine: AsyncEngine, prompt: Prompt) -> None:
    """All scenarios, one after the other."""
    num_served = await clients_hang_up(engine, prompt)
    print(f"hang-ups: {num_served} of 20 clients stayed and were served in full")
    late = await deadline_passes(engine, prompt)
    print(f"deadline: {late.finish_reason} with {len(late.token_ids)} tokens")
    shown = await user_presses_stop(engine, prompt)
    print(f"stop button: {shown[-1].finish_reason} with {num_tokens(shown)} tokens")
    results = await batch_is_cut_at_80_percent(engine, prompt)
    num_whole = sum(result.finish_reason == "length" for result in results)
    print(f"batch: {num_whole} of {len(results)} requests whole, the others partial")
    for rank, status in (await engine.status()).items():
        num_free = status.num_free_blocks + status.num_cached_blocks
        print(f"engine {rank}: {num_free} of {status.num_blocks} blocks free or cached")


async def main() -> None:
    async with await AsyncEngine.start(FrontendConfig()) as engine:
        await run(engine, {"prompt": "def quicksort(values):\n"})


if __name__ == "__main__":
    asyncio.run(main())
