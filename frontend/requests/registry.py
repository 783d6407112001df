"""The one map of requests that the front end has accepted, and who runs them.

Invariants
- An entry is live from `register` to `remove`. Whoever removes it sends its one terminal event;
  nobody else can.
- A request that ended here while an engine runs it is *ending*, until the engine says that it has
  left: its blocks are free then. Its outputs until then are nobody's.
- A name (the caller's id, an alias, the id of a batch) leads to entries only while they are live.
  A name of one's own is unique among all live names; the names of a batch are shared by its
  children only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from frontend.errors import DuplicateRequestIdError
from frontend.outputs import AbortCause, Stage, Terminal
from frontend.requests.admission import Place
from frontend.requests.mailbox import Mailbox
from frontend.requests.origin import Origin
from frontend.requests.weight_spans import Mark
from frontend.text.output_processor import OutputProcessor


@dataclass(slots=True, eq=False)
class Entry:
    """A live request, as the front end knows it. Times are of the dispatcher's clock."""

    internal_id: str
    """Unique for ever; the only id that engines see."""
    request_id: str
    """The caller's id."""
    mailbox: Mailbox
    accepted_s: float
    arrival_time_s: float = 0.0
    """The same moment, of the wall clock."""
    add_frames: Sequence[bytes] = ()
    """Its ADD, once its prompt's tokens are known and until it was sent."""
    processor: OutputProcessor | None = None
    """None until the prompt's tokens are known."""
    aliases: tuple[str, ...] = ()
    """Further names; with a batch_id, they are the batch's."""
    batch_id: str | None = None
    tags: frozenset[str] = frozenset()
    priority: int = 0
    place: Place | None = None
    """Among those that wait for their first token; held until then, or until the end."""
    engine_index: int | None = None
    """None until it was sent to an engine."""
    origin: Origin | None = None
    """None until the prompt's tokens are known."""
    weight_marks: list[Mark] = field(default_factory=list)
    unprocessed: list[int] = field(default_factory=list)
    """Tokens that arrived in this turn of the loop and have not become text yet."""
    last_output_s: float | None = None
    """None until its first token."""
    deadline: asyncio.TimerHandle | None = None
    abort_cause: AbortCause | None = None
    """Set when an explicit abort is on its way to the engine."""
    abort_started_s: float = 0.0
    terminal: Terminal | None = None
    """How it ended, once it has."""

    def leave_queue(self) -> None:
        """It waits for its first token no longer. Harmless to repeat."""
        if self.place is not None:
            self.place.leave()
            self.place = None

    @property
    def num_output_tokens(self) -> int:
        return len(self.mailbox.token_ids)

    @property
    def own_names(self) -> tuple[str, ...]:
        return (self.request_id, *self.aliases) if self.batch_id is None else (self.request_id,)

    @property
    def shared_names(self) -> tuple[str, ...]:
        return () if self.batch_id is None else (self.batch_id, *self.aliases)

    @property
    def names(self) -> tuple[str, ...]:
        """Each once; callers do give one twice."""
        return tuple(dict.fromkeys((*self.own_names, *self.shared_names)))

    @property
    def stage(self) -> Stage:
        """As far as it shows here; an engine knows more."""
        if self.engine_index is None:
            return "held" if self.add_frames else "tokenizing"
        return "waiting" if self.last_output_s is None else "decode"


@dataclass(slots=True, eq=False)
class Ending:
    """A request that has ended here and that its engine still runs."""

    entry: Entry
    engine_index: int
    ended_s: float
    cause: AbortCause
    abort_sent: bool = False


class RequestRegistry:
    """Live requests by internal id and by name, and the ending ones."""

    def __init__(self, num_engines: int) -> None:
        self._entries: dict[str, Entry] = {}
        self._by_name: dict[str, dict[str, Entry]] = {}
        self._ending: dict[str, Ending] = {}
        self.num_in_flight = [0] * num_engines
        """By engine: requests that it was sent and that have not left it, as far as we know."""
        self.get: Callable[[str], Entry | None] = self._entries.get
        """The live entry of an internal id. Bound once: it is asked for every token."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        """In order of acceptance."""
        return iter(self._entries.values())

    @property
    def ending(self) -> Sequence[Ending]:
        """In the order in which they ended here."""
        return tuple(self._ending.values())

    @property
    def num_ending(self) -> int:
        return len(self._ending)

    # -- live entries --------------------------------------------------------------------------

    def register(self, entry: Entry) -> None:
        """Accept a request. Raises DuplicateRequestIdError, and then nothing has changed."""
        for name in entry.own_names:
            if name in self._by_name:
                raise DuplicateRequestIdError(
                    f"request id {name!r} names a live request; choose another, or wait for its end"
                )
        for name in entry.shared_names:
            holders = self._by_name.get(name, {}).values()
            if any(holder.batch_id != entry.batch_id for holder in holders):
                raise DuplicateRequestIdError(
                    f"request id {name!r} names a live request; choose another, or wait for its end"
                )
        self._entries[entry.internal_id] = entry
        for name in entry.names:
            self._by_name.setdefault(name, {})[entry.internal_id] = entry

    def mark_sent(self, entry: Entry, engine_index: int) -> None:
        entry.engine_index = engine_index
        self.num_in_flight[engine_index] += 1

    def remove(self, entry: Entry) -> bool:
        """Take an entry out; the caller now owes it its terminal. False if somebody else was first.

        Its engine, if it has one, no longer runs it.
        """
        if not self._forget(entry):
            return False
        if entry.engine_index is not None:
            self.num_in_flight[entry.engine_index] -= 1
        return True

    def remove_running(self, entry: Entry, cause: AbortCause, now: float) -> bool:
        """The same for a request that its engine still runs: it is ending, and must be aborted."""
        if not self._forget(entry):
            return False
        if entry.engine_index is not None:
            self._ending[entry.internal_id] = Ending(entry, entry.engine_index, now, cause)
        return True

    def _forget(self, entry: Entry) -> bool:
        if self._entries.pop(entry.internal_id, None) is None:
            return False
        for name in entry.names:
            holders = self._by_name[name]
            del holders[entry.internal_id]
            if not holders:
                del self._by_name[name]
        return True

    # -- ending requests -----------------------------------------------------------------------

    def get_ending(self, internal_id: str, engine_index: int) -> Ending | None:
        """An ending request, if this engine runs it: others have no say in it."""
        ending = self._ending.get(internal_id)
        return ending if ending is not None and ending.engine_index == engine_index else None

    def claim_for_abort(self, internal_id: str) -> int | None:
        """The engine to tell that a request has ended; None if it need not be told (any more)."""
        ending = self._ending.get(internal_id)
        if ending is None or ending.abort_sent:
            return None
        ending.abort_sent = True
        return ending.engine_index

    def forget_aborts(self, engine_index: int) -> list[tuple[str, AbortCause]]:
        """What is ending in an engine and was aborted there may be aborted again: (id, cause)."""
        again = []
        for internal_id, ending in self._ending.items():
            if ending.engine_index == engine_index and ending.abort_sent:
                ending.abort_sent = False
                again.append((internal_id, ending.cause))
        return again

    def end(self, internal_id: str) -> None:
        """The engine no longer runs an ending request. Harmless to repeat."""
        ending = self._ending.pop(internal_id, None)
        if ending is not None:
            self.num_in_flight[ending.engine_index] -= 1

    def end_all_of(self, engine_index: int) -> None:
        """An engine is gone, and what was ending in it with it."""
        for key in [key for key, one in self._ending.items() if one.engine_index == engine_index]:
            self.end(key)

    # -- selectors -----------------------------------------------------------------------------

    def select_names(self, names: Sequence[str]) -> dict[str, list[Entry]]:
        """The live entries behind each exact name; an unknown name has none."""
        return {name: list(self._by_name.get(name, {}).values()) for name in names}

    def select(self, wanted: Callable[[Entry], bool]) -> list[Entry]:
        """All live entries that fit, in order of acceptance."""
        return [entry for entry in self if wanted(entry)]
