"""One rollout: its tokens, in as many pieces as it took, and what is known of each token.

Invariant: `served_by` is the loop's own account of who sampled which token, made from what had
arrived whenever engines stood still; `versions` is what the engine says. They come from different
ends, so that each can check the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from caesura import AsyncEngine, RequestStream, ResumeFrom, SamplingParams, WeightSpan

TAG = "rollout"


@dataclass(slots=True, eq=False, kw_only=True)
class Rollout:
    """A prompt and what was sampled for it. Token lists are over all pieces."""

    prompt_index: int
    prompt_token_ids: Sequence[int]
    seed: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of the sampled tokens, by the model that sampled each."""
    versions: list[str] = field(default_factory=list)
    """Which weights sampled each token, as the engine says."""
    served_by: list[str] = field(default_factory=list)
    """The same, as the loop saw it."""
    aborted: list[tuple[int, ResumeFrom]] = field(default_factory=list)
    """For each abort: how many tokens had arrived, and what the result said of going on."""
    finish_reason: str | None = None
    reading: asyncio.Task[None] | None = None
    _stream: RequestStream | None = None

    @property
    def is_finished(self) -> bool:
        """Whether it came to its own end; an aborted rollout can go on."""
        return self.finish_reason in ("stop", "length")

    def start(self, engine: AsyncEngine, sampling_params: SamplingParams) -> None:
        """Begin, or go on where an abort ended it, under whatever weights serve now."""
        if self.aborted:
            _, resume_from = self.aborted[-1]
            self._stream = engine.generate(
                resume_from=resume_from, sampling_params=sampling_params, tags=[TAG]
            )
        else:
            self._stream = engine.generate(
                prompt_token_ids=self.prompt_token_ids,
                sampling_params=sampling_params,
                tags=[TAG],
            )
        self.finish_reason = None
        self.reading = asyncio.create_task(self._read(self._stream))

    async def _read(self, stream: RequestStream) -> None:
        num_before = len(self.token_ids)
        async for output in stream:
            self.token_ids += output.token_ids
            self.logprobs += [entry.logprob for entry in output.logprobs]
        if output.error is not None:
            raise RuntimeError(f"the rollout of seed {self.seed} failed: {output.error.message}")
        # The last event says how it ended, and which weights sampled the tokens of this piece.
        self.versions += versions_of(output.weight_spans, len(self.token_ids) - num_before)
        if output.resume_from is not None:
            self.aborted.append((len(self.token_ids), output.resume_from))
        self.finish_reason = output.finish_reason

    def note(self, version: str) -> None:
        """Everything that arrived since the note before, read or not, is by this version."""
        num_unread = 0 if self._stream is None else self._stream.num_unread_tokens
        num_arrived = len(self.token_ids) + num_unread
        self.served_by += [version] * (num_arrived - len(self.served_by))


def versions_of(spans: Sequence[WeightSpan], num_tokens: int) -> list[str]:
    """The version of each token; "?" where no span says, which no check lets pass."""
    versions = ["?"] * num_tokens
    for span in spans:
        versions[span.start : span.end] = [span.version] * (span.end - span.start)
    return versions
