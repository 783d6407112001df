"""One request as its client knows it."""

from __future__ import annotations

import asyncio
import weakref
from dataclasses import dataclass, field

from frontend.outputs import AbortCause, RequestOutput
from frontend.requests.registry import Entry
from frontend.requests.stream import RequestStream
from scripts.simulation.oracle import Wants


@dataclass(slots=True, eq=False)
class ModelRequest:
    """One accepted request: what was asked for, and what has come of it."""

    number: int
    name: str
    aliases: tuple[str, ...]
    batch_id: str | None
    tags: frozenset[str]
    prompt: list[int]
    """Its token ids, also where they were sent as text."""
    wants: Wants
    timeout_s: float | None
    accepted_s: float
    entry: Entry
    stream: weakref.ref[RequestStream]
    is_read: bool
    """Whether its reader means to read it to its end."""
    earlier: list[int] = field(default_factory=list)
    """Outputs of those whom it continues."""
    earlier_labels: list[str] = field(default_factory=list)
    """Of the weights of each."""
    earlier_text: str = ""
    """What they gave out."""
    held_s: float | None = None
    """When the gate took it, if it was held as soon as it was accepted."""
    met_in: str = ""
    """The stage in which it was last aborted."""
    held_stream: RequestStream | None = None
    """Of a request that nobody reads."""
    reader: asyncio.Task[None] | None = None
    allowed_causes: set[AbortCause] = field(default_factory=set)
    """Why it may have been aborted, by what was done so far."""
    dropped_s: float | None = None
    """When its client let go of it."""
    ended_s: float | None = None
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    """Of the weights of each of its tokens, known at its end."""
    has_prompt_logprobs: bool = False
    last: RequestOutput | None = None
    """The event that carried its finish reason."""

    def note_drop(self) -> None:
        """Its client lets go of it now: it may end of that, and must at once."""
        self.allowed_causes.add(AbortCause.DROPPED_STREAM)
        if self.dropped_s is None:
            self.dropped_s = asyncio.get_running_loop().time()

    @property
    def is_dropped(self) -> bool:
        return self.dropped_s is not None

    @property
    def is_live(self) -> bool:
        return self.ended_s is None

    @property
    def names(self) -> tuple[str, ...]:
        batch = () if self.batch_id is None else (self.batch_id,)
        return (self.name, *self.aliases, *batch)

    @property
    def chain(self) -> list[int]:
        """All outputs, also of those whom it continues."""
        return [*self.earlier, *self.token_ids]

    @property
    def chain_text(self) -> str:
        return self.earlier_text + "".join(self.text)

    def __str__(self) -> str:
        return f"#{self.number} {self.name} ({self.entry.internal_id})"
