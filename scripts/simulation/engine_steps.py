"""What each step of one engine computes.

Checks
- `order`: nobody overtakes, neither among those that wait nor among those that a pause held or
  retracted.
- `stale prefix`: the cached KV that a request is given is of its own tokens, of the present weights
  and of its own tenant.
- `step size`: a step computes something for each of its rows, and no more than it may.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine_core.batch import StepBatch
from scripts.simulation.ledger_request import LedgerRequest
from scripts.simulation.oracle import cell

if TYPE_CHECKING:
    from scripts.simulation.ledger import Ledger


@dataclass(slots=True)
class EngineSteps:
    """Steps over a ledger's requests."""

    ledger: Ledger
    _tenants: dict[int, str | None] = field(default_factory=dict)
    """By block: who wrote it."""

    def on_step(self, batch: StepBatch) -> None:
        """A step has computed these rows."""
        ledger = self.ledger
        by_slot = {one.slot: one.request_id for one in ledger.core.scheduler.running}
        rows = [
            (ledger.live[by_slot[slot]], slot, num_computed)
            for slot, num_computed in zip(
                batch.slots.tolist(), batch.num_computed_tokens.tolist(), strict=True
            )
        ]
        sizes = batch.num_new_tokens.tolist()
        if min(sizes) < 1 or sum(sizes) > ledger.core.config.max_num_batched_tokens:
            ledger.violate("step size", f"engine {ledger.rank} computes {sizes} tokens")
        ledger.pauses.on_step((row, num_computed) for row, _, num_computed in rows)
        if batch.joined:
            tables = {one.slot: one.block_ids for one in batch.joined}
            joined = [row for row in rows if row[1] in tables]
            for request, slot, num_cached in joined:
                self._check_prefix(request, slot, num_cached)
                self._check_tenant(request, tables[slot], num_cached)
            self._check_order([request for request, *_ in joined], set(by_slot.values()))
        for slot, block_ids in batch.new_blocks:
            if slot in by_slot:
                tenant = ledger.live[by_slot[slot]].tenant
                self._tenants.update(dict.fromkeys(block_ids, tenant))

    def _check_prefix(self, request: LedgerRequest, slot: int, num_cached: int) -> None:
        """It begins, or is recomputed, behind so many cached tokens."""
        ledger = self.ledger
        salt = ledger.weights.salt
        ledger.weights.forget(request.internal_id)
        request.cell_salts = [salt] * num_cached
        wanted = [cell(token_id, salt) for token_id in request.context[:num_cached]]
        if ledger.runner.cells(slot, num_cached) != wanted:
            ledger.violate("stale prefix", f"{request.internal_id} was given KV of something else")

    def _check_tenant(self, request: LedgerRequest, table: list[int], num_cached: int) -> None:
        """Its table begins with the cached blocks; it writes the rest."""
        num_shared = num_cached // self.ledger.core.config.block_size
        for block_id in table[:num_shared]:
            if (tenant := self._tenants.get(block_id)) != request.tenant:
                self.ledger.violate("stale prefix", f"{request.internal_id} sees KV of {tenant}")
        self._tenants.update(dict.fromkeys(table[num_shared:], request.tenant))

    def _check_order(self, joined: list[LedgerRequest], running: set[str]) -> None:
        ledger = self.ledger
        last = max(request.order for request in joined)
        is_open = ledger.pauses.state == "running"
        for name, request in ledger.live.items():
            if name not in running and request.order < last and (is_open or request.has_begun):
                names = [one.internal_id for one in joined]
                ledger.violate("order", f"{names} began before {name}")
