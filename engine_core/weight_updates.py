"""Weight updates of one engine: staged part by part beside the weights that serve, then committed
between two steps, or dropped.

Invariants
- Until the commit nothing that a step reads has changed; after it every step runs under the new
  weights, and under their label.
- One update is staged at a time. A part that fails drops the whole update.
- Parts are loaded one after the other, on another thread; commits and discards never wait for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

from engine_core.batch import ModelRunner
from engine_core.jobs import Job
from engine_core.scheduler import Scheduler
from engine_core.staging import StagedWeights
from ipc import expect
from ipc.utility import UtilityCall
from ipc.weights import StagedReceipt, WeightsGroup, WeightSource

logger = logging.getLogger(__name__)

DEFAULT_WEIGHT_VERSION = "default"


@dataclass(slots=True)
class _Update:
    """The update that is on its way."""

    update_id: str
    staged: StagedWeights | None = None
    """As told to its sender; nothing can take effect before."""
    num_loading: int = 0
    loaded: StagedWeights | None = None
    """The same, as far as the jobs' thread has come. Nobody else touches it."""


class WeightUpdates:
    """The weights' label, and the update that is on its way."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler) -> None:
        self.version = DEFAULT_WEIGHT_VERSION
        self._runner = runner
        self._scheduler = scheduler
        self._update: _Update | None = None

    def stage(self, client_index: int, call: UtilityCall) -> Job:
        """Load one part. Raises ValueError if another update is on its way."""
        named, described = _arguments(call, 2)
        update_id, source = expect.text(named, "update_id"), WeightSource.from_wire(described)
        update = self._update
        if update is None:
            update = self._update = _Update(update_id)
        elif update.update_id != update_id:
            raise ValueError(
                f"weight update {update.update_id!r} is on its way; commit or discard it first"
            )
        update.num_loading += 1

        def load() -> StagedWeights:
            update.loaded = self._runner.stage(source, update.loaded)
            return update.loaded

        finish = partial(self._finish_stage, update)
        return Job(client_index, call.call_id, call.method, load, finish)

    def _finish_stage(self, update: _Update, outcome: object | Exception) -> object:
        update.num_loading -= 1
        if isinstance(outcome, Exception):
            if self._update is update:
                self._update = None
            raise ValueError(str(outcome))
        if self._update is not update:
            raise ValueError(f"weight update {update.update_id!r} was discarded meanwhile")
        staged = update.staged = cast(StagedWeights, outcome)
        receipt = StagedReceipt(
            num_tensors=staged.num_tensors, num_bytes=staged.num_bytes, checksum=staged.checksum
        )
        return receipt.to_wire()

    def commit(self, update_id: object, version: object = None) -> str:
        """Let a staged update take effect, under a new label if one is given."""
        update = self._update
        if update is None or update.update_id != update_id or update.staged is None:
            raise ValueError(f"no weight update {update_id!r} is staged")
        if update.num_loading:
            raise ValueError(f"weight update {update_id!r} is still being loaded")
        label = expect.optional(expect.text, version, "version")
        self._update = None
        self._runner.commit(update.staged)
        self._scheduler.begin_weight_epoch()
        if label is not None:
            self.version = label
        logger.info(
            "weights updated: %d tensors, %d bytes, now version %r",
            update.staged.num_tensors,
            update.staged.num_bytes,
            self.version,
        )
        return self.version

    def discard(self, update_id: object) -> bool:
        """Drop an update; returns whether it was there."""
        if self._update is None or self._update.update_id != update_id:
            return False
        self._update = None
        return True

    def label(self, version: object) -> None:
        """Only the label changes; nothing is aborted and nothing recomputed."""
        self.version = expect.text(version, "version")

    # -- groups of trainers --------------------------------------------------------------------

    def join_group(self, client_index: int, call: UtilityCall) -> Job:
        (group,) = _arguments(call, 1)
        members = WeightsGroup.from_wire(group)
        return self._group_job(client_index, call, lambda: self._runner.join_group(members))

    def leave_group(self, client_index: int, call: UtilityCall) -> Job:
        (name,) = _arguments(call, 1)
        group_name = expect.text(name, "group_name")
        return self._group_job(client_index, call, lambda: self._runner.leave_group(group_name))

    def _group_job(self, client_index: int, call: UtilityCall, run: Callable[[], object]) -> Job:
        def finish(outcome: object | Exception) -> None:
            if isinstance(outcome, Exception):
                raise outcome

        return Job(client_index, call.call_id, call.method, run, finish)


def _arguments(call: UtilityCall, count: int) -> tuple[object, ...]:
    if len(call.args) != count:
        raise TypeError(f"{call.method} takes {count} arguments, got {len(call.args)}")
    return tuple(call.args)
