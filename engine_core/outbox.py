"""Collects what one boundary or step has to say, as frames for each client.

Invariants
- Frames leave in the order in which their contents were added, per client.
- A utility reply has a frame of its own, behind every output added before it.
- Statistics ride on the first client's last output frame, or travel alone.
- An ended request is confirmed (`finished_requests`) to its client when its blocks have left it: in
  the frame of its terminal output or, where there is none, in the next one to that client. An ABORT
  of a request that is gone confirms it once more.
"""

from __future__ import annotations

from ipc.output import (
    EngineCoreOutput,
    EngineCoreOutputs,
    FinishReason,
    OutputError,
    SchedulerStats,
    StepOutputs,
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
        self._streamed: dict[int, StepOutputs] = {}
        self._ended: dict[int, list[str]] = {}
        self._stats: SchedulerStats | None = None

    def add(self, client_index: int, output: EngineCoreOutput) -> None:
        self._outputs.setdefault(client_index, []).append(output)

    def stream(self, client_index: int, request_ids: list[str], token_ids: list[int]) -> None:
        """A step's requests that got one token each and nothing besides; at most once a client."""
        if request_ids:
            outputs = self._outputs.get(client_index, [])
            self._streamed[client_index] = StepOutputs(request_ids, token_ids, outputs)
            self._outputs[client_index] = outputs

    def confirm_end(self, client_index: int, request_id: str) -> None:
        """Tell that a request holds nothing any more; its terminal, if it has one, is in the same
        frame.
        """
        self._outputs.setdefault(client_index, [])
        self._ended.setdefault(client_index, []).append(request_id)

    def refuse(self, client_index: int, request_id: str, error: OutputError) -> None:
        """End a request that cannot run, or not on: finish reason 3, with the reason in words."""
        output = EngineCoreOutput(request_id, (), finish_reason=FinishReason.ERROR, error=error)
        self.add(client_index, output)
        self.confirm_end(client_index, request_id)

    def reply(self, client_index: int, reply: UtilityReply) -> None:
        self._flush()
        frame = EngineCoreOutputs(
            engine_index=self._engine_index, timestamp=self._now, utility_output=reply
        )
        self._frames.append((client_index, frame))

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
            frame = EngineCoreOutputs(
                engine_index=self._engine_index,
                outputs=self._streamed.get(client_index, outputs),
                scheduler_stats=stats if client_index == STATS_CLIENT else None,
                timestamp=self._now,
                finished_requests=self._ended.get(client_index),
                weight_version=self._weight_version,
            )
            self._frames.append((client_index, frame))
        self._outputs = {}
        self._streamed = {}
        self._ended = {}
