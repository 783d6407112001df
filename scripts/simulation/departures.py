"""Checks the frames that leave a front end: auto-aborts come in as few as promised, and hit nobody
who lives (L7); explicit aborts are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import cast

from frontend.outputs import AbortCause
from frontend.requests import abort_queue
from frontend.requests.abort_queue import MAX_LINGER_S
from frontend.requests.registry import Entry, RequestRegistry
from ipc.abort import Abort
from ipc.frames import decode_input
from ipc.lifecycle import CAESURA_ABORT
from ipc.request_type import RequestType
from ipc.utility import UtilityCall
from scripts.simulation.engine_pauses import Violate


class Departures:
    """Everything that left one front end."""

    def __init__(
        self,
        registry: RequestRegistry,
        clock: Callable[[], float],
        corrupted: set[int],
        violate: Violate,
        on_deadline: Callable[[Entry], object],
    ) -> None:
        """`clock` is the dispatcher's; `on_deadline` hears which requests reached theirs.

        `corrupted` are engines that may have lost a word, and may be told twice.
        """
        self._registry = registry
        self._clock = clock
        self._corrupted = corrupted
        self._violate = violate
        self._on_deadline = on_deadline
        self.num_abort_calls: Counter[str] = Counter()
        """How often an explicit abort of each id has left."""
        self.is_punctual = True
        """Unless the front end stood still, or its clock jumped."""
        self._aborted: set[str] = set()
        """Ids that an ABORT frame has named."""
        self._turns: list[set[str]] = []
        """Ids that were dropped in one turn of the loop."""
        self._turns_sent: set[tuple[int, int]] = set()
        """(number of the turn, rank) of those that have left."""

    def note_drops(self, internal_ids: Iterable[str]) -> None:
        """These are about to be dropped in one turn of the loop."""
        self._turns.append(set(internal_ids))

    def on_send(self, rank: int, frames: Sequence[bytes]) -> str:
        """A message leaves for an engine; returns what it is."""
        if frames[0] == RequestType.ADD.frame:
            return "ADD"
        match decode_input(frames):
            case Abort(request_ids):
                self._check_abort_frame(rank, request_ids)
                return "ABORT"
            case UtilityCall(_, _, method, args):
                if method == CAESURA_ABORT:
                    self._note_abort_call(cast(Sequence[str], args[0]), args[1])
                return method
        return "?"

    def _note_abort_call(self, internal_ids: Sequence[str], cause: object) -> None:
        self.num_abort_calls.update(internal_ids)
        if cause == AbortCause.DEADLINE:
            for internal_id in internal_ids:
                if (entry := self._registry.get(internal_id)) is not None:
                    self._on_deadline(entry)

    def _check_abort_frame(self, rank: int, internal_ids: Sequence[str]) -> None:
        for internal_id in internal_ids:
            if self._registry.get(internal_id) is not None:
                self._violate("exact aim", f"an ABORT frame names the live request {internal_id}")
            if internal_id in self._aborted and rank not in self._corrupted:
                self._violate("one frame", f"{internal_id} is in a second ABORT frame")
        self._aborted.update(internal_ids)
        if rank in self._corrupted:
            return
        for number, turn in enumerate(self._turns):
            if not turn.isdisjoint(internal_ids):
                if (number, rank) in self._turns_sent:
                    self._violate("one frame", f"drops of one turn left in two: {sorted(turn)}")
                if len(internal_ids) < abort_queue.MAX_IDS_PER_FRAME:
                    self._turns_sent.add((number, rank))
        for one in self._registry.ending:
            if one.engine_index != rank:
                continue
            internal_id = one.entry.internal_id
            if not one.abort_sent:
                self._violate("one frame", f"an ABORT frame left without {internal_id}")
            waited_s = self._clock() - one.ended_s
            is_late = self.is_punctual and waited_s > MAX_LINGER_S + 1e-6
            if internal_id in internal_ids and is_late:
                self._violate("one frame", f"the auto-abort of {internal_id} waited {waited_s} s")
