"""One weight update: what is known of it on its way, and what its callers are told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from frontend.errors import EngineTimeoutError, UtilityCallError, WeightUpdateError
from frontend.requests.fan_out import EngineOutcome, FanOut
from ipc.errors import WireError
from ipc.weights import StagedReceipt


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdateReport:
    """What an update did or, of a part of several, what is staged so far."""

    state: Literal["staged", "committed"]
    """A part of several is only staged; it takes effect with the end of the update."""
    version: str | None
    """The weights' label from now on; None if engines differ, or for a part that only staged."""
    num_tensors: int
    num_bytes: int
    """Both of all parts."""
    checksum: str
    """Of the last part."""
    staging_s: float
    paused_s: float
    """How long this update kept engines from running; 0 if they were paused before."""
    engines: dict[int, EngineOutcome]


@dataclass(slots=True, eq=False)
class Update:
    """The update that is on its way."""

    update_id: str
    is_session: bool
    phase: Literal["open", "staging", "failed", "committing"] = "open"
    version: str | None = None
    staged: StagedReceipt | None = None
    staging_s: float = 0.0

    @property
    def obstacle(self) -> str:
        """Why nothing can be added to it now."""
        if self.phase == "failed":
            return (
                f"a part of weight update {self.update_id} failed, so none of it takes effect; "
                f"begin anew, or discard it"
            )
        return (
            f"weight update {self.update_id} is on its way ({self.phase}); wait for its end, or "
            f"discard it"
        )

    def report(
        self,
        state: Literal["staged", "committed"],
        version: str | None,
        paused_s: float,
        engines: dict[int, EngineOutcome],
    ) -> WeightUpdateReport:
        assert self.staged is not None
        return WeightUpdateReport(
            state=state,
            version=version,
            num_tensors=self.staged.num_tensors,
            num_bytes=self.staged.num_bytes,
            checksum=self.staged.checksum,
            staging_s=self.staging_s,
            paused_s=paused_s,
            engines=engines,
        )


def agreed_receipt(fan_out: FanOut) -> StagedReceipt:
    """What all engines that live have staged; raises if they have not, or not the same."""
    try:
        answers = fan_out.answers("the staging of weights")
        receipts = {
            rank: StagedReceipt.from_wire(answer, f"engine {rank}'s receipt")
            for rank, answer in answers.items()
        }
    except (UtilityCallError, WireError) as error:
        raise WeightUpdateError(f"{error}; nothing was changed") from error
    except EngineTimeoutError as error:
        raise EngineTimeoutError(f"{error}; nothing was changed") from None
    first = next(iter(receipts.values()))
    if any(receipt != first for receipt in receipts.values()):
        differences = ", ".join(
            f"engine {rank} {receipt.num_tensors} with checksum {receipt.checksum}"
            for rank, receipt in receipts.items()
        )
        raise WeightUpdateError(
            f"engines loaded different tensors: {differences}; nothing was changed; do all of them "
            f"see the same files?"
        )
    return first
