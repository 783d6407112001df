"""The one map of requests that the front end has accepted, and who runs them.

Invariants
- An entry is live from `register` to `remove`. Whoever removes it sends its one terminal event;
  nobody else can.
- An id that an engine still runs after its entry was removed is an *orphan*, until the engine
  ends it or an abort for it is on its way. Outputs of orphans are nobody's.
- A name (the caller's id, an alias, the id of a batch) leads to entries only while they are live.
  A name of one's own is unique among all live names; the name of a batch is shared by its children
  only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from frontend.errors import DuplicateRequestIdError
from frontend.outputs import AbortCause, Terminal
from frontend.requests.mailbox import Mailbox
from frontend.text.output_processor import OutputProcessor


@dataclass(slots=True, eq=False)
class Entry:
    """A live request, as the front end knows it."""

    internal_id: str
    """Unique for ever; the only id that engines see."""
    request_id: str
    """The caller's id."""
    mailbox: Mailbox
    processor: OutputProcessor | None = None
    """None until the prompt's tokens are known."""
    aliases: tuple[str, ...] = ()
    batch_id: str | None = None
    tags: frozenset[str] = frozenset()
    engine_index: int | None = None
    """None until it was sent to an engine."""
    num_output_tokens: int = 0
    abort_cause: AbortCause | None = None
    """Set when an explicit abort is on its way to the engine."""
    terminal: Terminal | None = None
    """How it ended, once it has."""

    @property
    def own_names(self) -> tuple[str, ...]:
        return (self.request_id, *self.aliases)


class RequestRegistry:
    """Live requests by internal id and by name, and the orphans that engines still run."""

    def __init__(self, num_engines: int) -> None:
        self._entries: dict[str, Entry] = {}
        self._by_name: dict[str, dict[str, Entry]] = {}
        self._orphans: dict[str, int] = {}
        self.num_in_flight = [0] * num_engines
        """By engine: requests that it was sent and that have not left it, as far as we know."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        """In order of acceptance."""
        return iter(self._entries.values())

    @property
    def num_orphans(self) -> int:
        return len(self._orphans)

    # -- live entries --------------------------------------------------------------------------

    def register(self, entry: Entry) -> None:
        """Accept a request. Raises DuplicateRequestIdError, and then nothing has changed."""
        for name in entry.own_names:
            if name in self._by_name:
                raise DuplicateRequestIdError(
                    f"request id {name!r} names a live request; choose another, or wait for its end"
                )
        batch = self._by_name.get(entry.batch_id) if entry.batch_id is not None else None
        if batch and any(sibling.batch_id != entry.batch_id for sibling in batch.values()):
            raise DuplicateRequestIdError(
                f"batch id {entry.batch_id!r} names a live request; choose another"
            )
        self._entries[entry.internal_id] = entry
        for name in self._names(entry):
            self._by_name.setdefault(name, {})[entry.internal_id] = entry

    def get(self, internal_id: str) -> Entry | None:
        return self._entries.get(internal_id)

    def mark_sent(self, entry: Entry, engine_index: int) -> None:
        entry.engine_index = engine_index
        self.num_in_flight[engine_index] += 1

    def remove(self, internal_id: str, *, engine_runs_it: bool) -> Entry | None:
        """Take an entry out; the caller now owes it its terminal. None if somebody else was first.

        `engine_runs_it`: the engine does not know yet that it ended, so the id becomes an orphan
        (if it was sent).
        """
        entry = self._entries.pop(internal_id, None)
        if entry is None:
            return None
        for name in self._names(entry):
            holders = self._by_name[name]
            del holders[internal_id]
            if not holders:
                del self._by_name[name]
        if entry.engine_index is not None:
            if engine_runs_it:
                self._orphans[internal_id] = entry.engine_index
            else:
                self.num_in_flight[entry.engine_index] -= 1
        return entry

    # -- orphans -------------------------------------------------------------------------------

    def claim_orphan(self, internal_id: str) -> int | None:
        """The engine that still runs this removed request; None if none does. It is no orphan
        afterwards.
        """
        engine_index = self._orphans.pop(internal_id, None)
        if engine_index is not None:
            self.num_in_flight[engine_index] -= 1
        return engine_index

    def end_orphan(self, internal_id: str, engine_index: int) -> None:
        """An engine tells that it no longer runs this request; others cannot."""
        if self._orphans.get(internal_id) == engine_index:
            self.claim_orphan(internal_id)

    def forget_orphans(self, engine_index: int) -> None:
        """An engine is gone, and its orphans with it."""
        for internal_id in [key for key, owner in self._orphans.items() if owner == engine_index]:
            self.claim_orphan(internal_id)

    # -- selectors -----------------------------------------------------------------------------

    def select_names(self, names: Sequence[str]) -> dict[str, list[Entry]]:
        """The live entries behind each exact name; an unknown name has none."""
        return {name: list(self._by_name.get(name, {}).values()) for name in names}

    def select(self, wanted: Callable[[Entry], bool]) -> list[Entry]:
        """All live entries that fit, in order of acceptance."""
        return [entry for entry in self if wanted(entry)]

    def _names(self, entry: Entry) -> set[str]:
        names = set(entry.own_names)
        if entry.batch_id is not None:
            names.add(entry.batch_id)
        return names
