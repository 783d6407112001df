"""Collects what one boundary or step has to say, as frames for each client.

Invariants
- Frames leave in the order in which their contents were added, per client.
- A utility reply has a frame of its own, behind every output added before it.
- Statistics ride on the first client's last output frame, or travel alone.
"""

from __future__ import annotations

from ipc.output import (
    EngineCoreOutput,
    EngineCoreOutputs,
    FinishReason,
    OutputError,
    SchedulerStats,
)
from ipc.utility import UtilityReply

Outgoing = tuple[int, EngineCoreOutputs]
"""(client index, frame)"""

STATS_CLIENT = 0


class Outbox:
    """One boundary's or step's outputs; `frames` closes it."""

    def __init__(self, engine_index: int, now: float, weight_version: str | None = None) -> None:
        self._engine_index = engine_index
        self._now = now
        self._weight_version = weight_version
        self._frames: list[Outgoing] = []
        self._outputs: dict[int, list[EngineCoreOutput]] = {}
        self._stats: SchedulerStats | None = None

    def add(self, client_index: int, output: EngineCoreOutput) -> None:
        self._outputs.setdefault(client_index, []).append(output)

    def refuse(self, client_index: int, request_id: str, message: str) -> None:
        """End a request that never began: finish reason 3, with the reason in words."""
        self.add(
            client_index,
            EngineCoreOutput(
                request_id,
                (),
                finish_reason=FinishReason.ERROR,
                error=OutputError("validation_error", message, retryable=False),
            ),
        )

    def reply(self, client_index: int, reply: UtilityReply) -> None:
        self._flush()
        self._frames.append((client_index, self._frame(utility_output=reply)))

    def set_stats(self, stats: SchedulerStats) -> None:
        self._stats = stats

    def frames(self) -> list[Outgoing]:
        """Everything added, in order."""
        if self._stats is not None:
            self._outputs.setdefault(STATS_CLIENT, [])
        self._flush(self._stats)
        return self._frames

    def _flush(self, stats: SchedulerStats | None = None) -> None:
        for client_index, outputs in self._outputs.items():
            frame = self._frame(
                outputs=tuple(outputs),
                scheduler_stats=stats if client_index == STATS_CLIENT else None,
                weight_version=self._weight_version,
            )
            self._frames.append((client_index, frame))
        self._outputs = {}

    def _frame(
        self,
        *,
        outputs: tuple[EngineCoreOutput, ...] = (),
        scheduler_stats: SchedulerStats | None = None,
        utility_output: UtilityReply | None = None,
        weight_version: str | None = None,
    ) -> EngineCoreOutputs:
        return EngineCoreOutputs(
            engine_index=self._engine_index,
            outputs=outputs,
            scheduler_stats=scheduler_stats,
            timestamp=self._now,
            utility_output=utility_output,
            weight_version=weight_version,
        )
