"""New weights amid a load: what the streams that cross the update get, and later requests."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlencode

from ipc.pause import PauseMode
from scripts.control_bench.client import Answer, Control, TokenStream, make_prompt
from scripts.control_bench.reference import WEIGHTS_FILE, Reference
from scripts.control_bench.server import Books, until_idle

PROMPT_TOKENS = 64
LATER_TOKENS = 48
PATIENCE_S = 120.0
"""For requests to end that should."""

Transport = Literal["disk", "tensors"]
"""A directory that engines read, or a safetensors file as the body of the call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateLife:
    """One update, as the clients saw it."""

    number: int
    mode: PauseMode
    old: str
    """The version before."""
    new: str
    call: Answer
    streams: list[TokenStream]
    """They had begun when the call was made."""
    later: list[TokenStream]
    """The same prompts once more, when it had been answered and the streams had ended."""
    after: Books

    @property
    def committed_s(self) -> float:
        """About when the engines paused for it."""
        return self.call.end_s - float(self.call.checked()["paused_s"])


async def update(
    port: int,
    mode: PauseMode,
    transport: Transport,
    weights: Path,
    *,
    number: int,
    num_streams: int,
    num_tokens: int,
) -> UpdateLife:
    """Change to the weights of a directory; `number` makes prompts and the version's name."""
    chance = random.Random(number)
    control = await Control.open(port)
    old = (await control.get("/v1/status")).checked()["weight_version"]
    prompts = [make_prompt(1000 * number + place, PROMPT_TOKENS) for place in range(num_streams)]
    streams = [await TokenStream.open(port, prompt, num_tokens) for prompt in prompts]
    later = [await TokenStream.open(port, prompt, LATER_TOKENS) for prompt in prompts]
    for stream in streams:
        stream.send()
    await asyncio.gather(*(stream.connection.first_event for stream in streams))
    await asyncio.sleep(chance.uniform(0.05, 0.1))
    options = {"version": f"v{number}", "mode": mode}
    if transport == "disk":
        call = await control.post("/v1/weights", {"path": str(weights), **options})
    else:
        tensors = (weights / WEIGHTS_FILE).read_bytes()
        call = await control.post(f"/v1/weights?{urlencode(options)}", tensors)
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(stream.ended for stream in streams))
        for stream in later:
            stream.send()
        await asyncio.gather(*(stream.ended for stream in later))
    after = await until_idle(control)
    control.close()
    for stream in (*streams, *later):
        stream.close()
    return UpdateLife(
        number=number,
        mode=mode,
        old=old,
        new=options["version"],
        call=call,
        streams=streams,
        later=later,
        after=after,
    )


def spans(stream: TokenStream) -> list[dict[str, Any]]:
    """The versions of its tokens, as its end tells them."""
    endings = stream.received.endings
    return list(endings[0].get("weight_versions", [])) if endings else []


def has_right_spans(life: UpdateLife, stream: TokenStream) -> bool:
    """Whether they are the old version, then the new, and cover what came."""
    parts = spans(stream)
    bounds = [0, *(part["end"] for part in parts)]
    return (
        [part["version"] for part in parts]
        == ([life.old] if life.mode == "abort" else [life.old, life.new])
        and [part["start"] for part in parts] == bounds[:-1]
        and bounds == sorted(set(bounds))
        and bounds[-1] == len(stream.received.token_ids)
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one stream that crossed an update and has right spans."""

    num_wrong: int
    """Tokens that are not what the weights of their span say."""
    is_sharp: bool
    """Whether a boundary that was one token off, either way, would have made one wrong."""


def judge(life: UpdateLife, stream: TokenStream, old: Reference, new: Reference) -> Verdict:
    """The old version's tokens by the old weights. The new one's behind all that came before:
    computed anew with the new weights (`retract`), or with the KV that the old ones wrote (`keep`).
    """
    prompt, tokens = stream.prompt, stream.received.token_ids
    at = spans(stream)[0]["end"]
    by_old = old.errors(prompt, tokens)
    if life.mode == "abort":
        return Verdict(sum(by_old), is_sharp=True)
    if life.mode == "keep":
        by_new = [False] * (at - 1) + new.errors_after(old, prompt, tokens, at - 1)
        by_new[at:] = new.errors_after(old, prompt, tokens, at)
    else:
        by_new = new.errors(prompt, tokens)
    return Verdict(sum(by_old[:at]) + sum(by_new[at:]), is_sharp=by_old[at] and by_new[at - 1])
