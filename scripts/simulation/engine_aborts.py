"""Receipts of one engine's abort calls: when one leaves, it is true and its effect is there.

Check `receipt`: stages, tokens and blocks are those that the call found, and each request's
terminal came before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ipc.utility import UtilityReply

if TYPE_CHECKING:
    from scripts.simulation.ledger import Ledger

Expected = dict[str, tuple[str, int, str | None]]
"""By request: (status, number of tokens, stage)"""


@dataclass(slots=True)
class EngineAborts:
    """Abort calls over a ledger's requests."""

    ledger: Ledger
    _receipts: dict[int, tuple[Expected, int]] = field(default_factory=dict)
    """By call: what must be in its receipt, and the blocks that its requests held."""

    def abort(self, call_id: int, internal_ids: Iterable[str]) -> None:
        """The call takes effect behind the inputs so far."""
        ledger, num_blocks = self.ledger, 0
        expected: Expected = {}
        for internal_id in internal_ids:
            request = ledger.live.get(internal_id)
            if request is None or request.is_aborted:
                expected[internal_id] = ("unknown", 0, None)
                continue
            request.is_aborted = True
            inside = ledger.core._requests.get(internal_id)
            stage = "waiting" if inside is None else inside.stage.value
            if internal_id in ledger.pauses.given_up:
                stage = "preempted"
            elif inside is not None:
                num_blocks += len(inside.block_ids)
            expected[internal_id] = ("aborted", request.num_new_tokens, stage)
        self._receipts[call_id] = expected, num_blocks

    def check_reply(self, reply: UtilityReply) -> None:
        """If it answers an abort."""
        if reply.call_id not in self._receipts:
            return
        ledger, result = self.ledger, reply.result
        expected, expected_num_blocks = self._receipts.pop(reply.call_id)
        if not isinstance(result, dict):
            ledger.violate("receipt", f"an abort failed: {reply.failure_message}")
            return
        told = {
            internal_id: (one["status"], one["num_output_tokens"], one["stage"])
            for internal_id, one in result["requests"].items()
        }
        if told != expected:
            ledger.violate("receipt", f"engine {ledger.rank} told {told}, but true is {expected}")
        num_blocks = result["num_blocks_freed"] + result["num_blocks_cached"]
        if num_blocks != expected_num_blocks:
            ledger.violate("receipt", f"engine {ledger.rank} told {num_blocks} blocks")
        for internal_id in expected:
            if internal_id in ledger.live:
                ledger.violate("receipt", f"{internal_id}: the receipt came before its terminal")
            ledger.check_gone(internal_id, "receipted")
