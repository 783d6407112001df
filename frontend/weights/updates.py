"""One weight update at a time, on all engines or on none.

    stage a part on every engine ... -> pause, unless paused -> commit on every engine -> resume

Engines load and check a part beside the weights that serve, so whatever is wrong with it shows
before anything pauses. The commit itself swaps what lies ready.

Invariants
- Until the first commit is sent nothing has changed: a failed part, a missing answer or a caller
  that gives up is followed by a discard on every engine.
- From then on nothing is taken back, and a caller that gives up stops nothing: the commit and the
  resume run to their end.
- Engines that were running run again afterwards, whatever happened; those that were paused stay so.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Literal

from frontend.errors import (
    EngineDeadError,
    EngineTimeoutError,
    InvalidRequestError,
    PauseConflictError,
    PauseInterruptedError,
    WeightUpdateConflictError,
    WeightUpdateError,
    WeightUpdateIncompleteError,
)
from frontend.ids import new_id
from frontend.outputs import AbortCause
from frontend.requests.dispatcher import Dispatcher
from frontend.requests.explicit_abort import ExplicitAborts, Selector
from frontend.requests.fan_out import EngineOutcome, FanOut, name_engines
from frontend.requests.pause_gate import PauseOrder
from frontend.requests.pauses import Pauses
from frontend.weights.update import Update, WeightUpdateReport, agreed_receipt
from ipc.errors import WireError
from ipc.pause import PauseMode
from ipc.weights import (
    CAESURA_COMMIT_WEIGHTS,
    CAESURA_DISCARD_WEIGHTS,
    CAESURA_STAGE_WEIGHTS,
    WeightSource,
)

logger = logging.getLogger(__name__)

SLOW_STAGING_S = 10.0
"""After so long the log says which engines an update waits for."""
COMMIT_TIMEOUT_S = 60.0
"""A commit waits for one step, and swaps what lies ready."""
RESUME_TIMEOUT_S = 5.0
DISCARD_TIMEOUT_S = 5.0


class WeightUpdates:
    """Carries out weight updates over a dispatcher and its pauses."""

    def __init__(self, dispatcher: Dispatcher, pauses: Pauses, aborts: ExplicitAborts) -> None:
        self._dispatcher = dispatcher
        self._pauses = pauses
        self._aborts = aborts
        self._loop = asyncio.get_running_loop()
        self._update: Update | None = None
        self._commits: set[asyncio.Task[WeightUpdateReport]] = set()
        self._has_paused = False

    # -- what callers ask for ------------------------------------------------------------------

    async def update(
        self, source: WeightSource, *, version: str | None, mode: PauseMode, timeout_s: float
    ) -> WeightUpdateReport:
        """Stage a part; without a session, commit it too, after at most `timeout_s` of staging and
        pausing.
        """
        deadline_s = self._loop.time() + timeout_s
        PauseOrder(mode=mode, pause_id="")  # A wrong mode shows before anything is staged.
        update = self._claim()
        update.version = version if version is not None else update.version
        outcomes = await self._stage(update, source, timeout_s)
        if update.is_session:
            return update.report("staged", None, 0.0, outcomes)
        return await self._commit_whatever_happens(update, mode, deadline_s - self._loop.time())

    @property
    def is_committing(self) -> bool:
        """Whether engines that an update paused are about to run again."""
        return self._has_paused

    def check_free(self) -> None:
        """Raise unless a part can be staged now."""
        if self._dispatcher.foreign_engines & self._dispatcher.alive_engines:
            raise WeightUpdateError("a plain vLLM engine takes no weight updates from here")
        if not self._dispatcher.alive_engines:
            raise EngineDeadError("no engine is alive; restart the server")
        if self._update is not None and not (
            self._update.is_session and self._update.phase == "open"
        ):
            raise WeightUpdateConflictError(self._update.obstacle)

    def begin(self) -> None:
        """Parts from now on are only staged, until `end`."""
        if self._update is not None and self._update.phase == "failed":
            self._update = None
        self.check_free()
        if self._update is not None:
            raise WeightUpdateConflictError(
                f"weight update {self._update.update_id} has begun already; end or discard it first"
            )
        self._update = Update(new_id(), is_session=True)

    async def end(
        self, *, version: str | None, mode: PauseMode, timeout_s: float
    ) -> WeightUpdateReport:
        """Commit all parts since `begin`. `timeout_s` is for pausing."""
        PauseOrder(mode=mode, pause_id="")
        update = self._update
        if update is None or not update.is_session:
            raise WeightUpdateConflictError("no weight update has begun; begin one first")
        if update.phase == "failed":
            self._update = None
        if update.phase != "open":
            raise WeightUpdateConflictError(update.obstacle)
        if update.staged is None:
            raise WeightUpdateConflictError(f"weight update {update.update_id} has no part yet")
        update.version = version if version is not None else update.version
        return await self._commit_whatever_happens(update, mode, timeout_s)

    async def discard(self) -> bool:
        """Drop the update that is being staged; False if there is none."""
        if (update := self._update) is None:
            return False
        if update.phase == "committing":
            raise WeightUpdateConflictError(
                f"weight update {update.update_id} is taking effect and cannot be discarded"
            )
        if update.phase == "failed":
            self._update = None  # The engines were told then.
        else:
            await self._drop(update, "discarded").wait(DISCARD_TIMEOUT_S)
        return True

    # -- staging -------------------------------------------------------------------------------

    def _claim(self) -> Update:
        self.check_free()
        if self._update is None:
            self._update = Update(new_id(), is_session=False)
        self._update.phase = "staging"
        return self._update

    async def _stage(
        self, update: Update, source: WeightSource, timeout_s: float
    ) -> dict[int, EngineOutcome]:
        """On any failure, and if the caller gives up, the whole update is dropped everywhere."""
        started_s = self._dispatcher.clock()
        try:
            fan_out = self._call(CAESURA_STAGE_WEIGHTS, update.update_id, source.to_wire())
        except WireError as error:
            self._fail(update)
            raise InvalidRequestError(str(error)) from None
        try:
            await fan_out.wait(min(timeout_s, SLOW_STAGING_S), until_failure=True)
            if (late := fan_out.unanswered) and not fan_out.failures:
                logger.warning(
                    "weight update %s: %s still loading after %g s",
                    update.update_id,
                    name_engines(late),
                    min(timeout_s, SLOW_STAGING_S),
                )
                await fan_out.wait(max(0.0, timeout_s - SLOW_STAGING_S), until_failure=True)
            if self._update is not update:
                raise WeightUpdateConflictError(
                    f"weight update {update.update_id} was discarded meanwhile; nothing was changed"
                )
            update.staged = agreed_receipt(fan_out)
        except BaseException as error:
            if self._update is update:
                logger.warning("weight update %s failed: %r", update.update_id, error)
                self._fail(update)
                if update.is_session and isinstance(error, WeightUpdateError):
                    raise WeightUpdateError(f"{error}; begin the update anew") from None
            raise
        finally:
            fan_out.give_up()
        update.staging_s += self._dispatcher.clock() - started_s
        update.phase = "open"
        return fan_out.outcomes

    def _fail(self, update: Update) -> None:
        """A part failed. Of several, those behind it must not take effect without it."""
        self._drop(update, "failed")
        if update.is_session:
            update.phase = "failed"
            self._update = update

    def _drop(self, update: Update, result: Literal["failed", "discarded"]) -> FanOut:
        """Nothing of it takes effect; a later update may begin at once, behind the discards."""
        self._update = None
        self._dispatcher.metrics.on_weight_update(result)
        return self._call(CAESURA_DISCARD_WEIGHTS, update.update_id)

    def _call(self, method: str, *arguments: object) -> FanOut:
        dispatcher = self._dispatcher
        return FanOut.start(dispatcher.client, dispatcher.alive_engines, method, *arguments)

    # -- taking effect -------------------------------------------------------------------------

    async def _commit_whatever_happens(
        self, update: Update, mode: PauseMode, timeout_s: float
    ) -> WeightUpdateReport:
        update.phase = "committing"
        commit = self._loop.create_task(self._commit(update, mode, timeout_s))
        self._commits.add(commit)
        commit.add_done_callback(self._note_commit_done)
        return await asyncio.shield(commit)

    def _note_commit_done(self, commit: asyncio.Task[WeightUpdateReport]) -> None:
        self._commits.discard(commit)
        if not commit.cancelled():
            commit.exception()  # It was logged, and its caller may have given up.

    async def _commit(
        self, update: Update, mode: PauseMode, timeout_s: float
    ) -> WeightUpdateReport:
        was_running = self._has_paused = self._pauses.state.state == "running"
        order = PauseOrder(mode=mode, pause_id=f"weight-update-{update.update_id}")
        started_s = self._dispatcher.clock()
        try:
            try:
                if was_running:
                    await self._pauses.pause(order, max(timeout_s, 1.0))
                    holding = self._pauses.state.pause_id
                    if holding not in (None, order.pause_id):
                        raise WeightUpdateConflictError(
                            f"pause {holding!r} took the place of this update's own (mode {mode}); "
                            f"nothing was changed; send it again"
                        )
                else:
                    await self._pauses.wait_until_paused(max(timeout_s, 1.0))
                    if mode == "abort":
                        await self._abort_held(max(timeout_s, 1.0))
                await self._stand_still(max(timeout_s, 1.0))
            except BaseException as error:
                logger.warning(
                    "weight update %s failed, nothing was changed: %r", update.update_id, error
                )
                self._drop(update, "failed")
                if isinstance(error, PauseInterruptedError):
                    again = f"{error}; nothing was changed; send the update again"
                    raise PauseInterruptedError(again) from None
                raise
            outcomes = await self._commit_everywhere(update)
        finally:
            self._update, self._has_paused = None, False
            paused_s = 0.0
            if was_running:
                paused_s = self._dispatcher.clock() - started_s
                self._dispatcher.metrics.on_weight_update_pause(paused_s)
                await self._resume(order.pause_id)
        self._dispatcher.metrics.on_weight_update("committed")
        version = self._dispatcher.weight_version
        report = update.report("committed", version, paused_s, outcomes)
        logger.info(
            "weights updated to version %s: %d tensors, %d bytes, staged in %.3f s, paused for "
            "%.3f s (%s)",
            report.version,
            report.num_tensors,
            report.num_bytes,
            report.staging_s,
            report.paused_s,
            mode if was_running else "by an earlier pause",
        )
        return report

    async def _stand_still(self, timeout_s: float) -> None:
        """Return in a moment in which a pause holds: a newer one may be draining again."""
        while (state := self._pauses.state.state) != "paused":
            if state == "running":
                raise PauseInterruptedError("a resume ended the pause")
            await self._pauses.wait_until_paused(timeout_s)

    async def _abort_held(self, timeout_s: float) -> None:
        """End what an earlier pause holds; it goes on holding."""
        pending = self._aborts.start(Selector(everything=True), AbortCause.PAUSE)
        receipt = await self._aborts.finish(pending, timeout_s)
        if late := [rank for rank, outcome in receipt.engines.items() if outcome == "timeout"]:
            raise EngineTimeoutError(
                f"{name_engines(late)} did not end its requests in time; no weights were changed"
            )

    async def _commit_everywhere(self, update: Update) -> dict[int, EngineOutcome]:
        fan_out = self._call(CAESURA_COMMIT_WEIGHTS, update.update_id, update.version)
        fan_out.on_result(
            lambda rank, version: self._dispatcher.note_weight_version(rank, str(version))
        )
        await fan_out.wait(COMMIT_TIMEOUT_S)
        failures, late = fan_out.failures, fan_out.unanswered
        if not failures and not late and fan_out.results:
            return fan_out.outcomes
        self._dispatcher.metrics.on_weight_update("incomplete")
        self._call(CAESURA_DISCARD_WEIGHTS, update.update_id)  # Where it did not take effect.
        message = f"weight update {update.update_id} took effect on "
        message += name_engines(fan_out.results) if fan_out.results else "no engine"
        if late:
            message += (
                f"; {name_engines(late)} did not answer in {COMMIT_TIMEOUT_S:g} s, it may yet"
            )
        for failure in failures:
            message += f"; not on {failure}"
        message += "; update again, so that all have the same weights"
        logger.error("%s", message)
        raise WeightUpdateIncompleteError(message, dict(fan_out.outcomes))

    async def _resume(self, pause_id: str) -> None:
        try:
            await self._pauses.resume(pause_id, RESUME_TIMEOUT_S)
        except PauseConflictError:
            logger.info("the weight update leaves a pause that began meanwhile as it is")
