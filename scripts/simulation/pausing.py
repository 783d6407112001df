"""Pauses and resumes, and what their answers must be.

Checks
- `pause abort`: when it is answered, everything accepted before has ended.
- `pause answer`: a pause fails only for a reason: a time-out of its own, a resume, a death.
- `resume`: it is refused (409) exactly if it names another pause; it ends every pause on every
  engine, and releases what was held.
- `flush`: see `engine_pauses`.
"""

from __future__ import annotations

from typing import Any

from frontend.errors import (
    EngineDeadError,
    EngineTimeoutError,
    PauseConflictError,
    PauseInterruptedError,
    PauseTimeoutError,
    UtilityCallError,
)
from scripts.simulation.actors import Actor

SOMEBODY_ELSE = "somebody-else"


class Pausing(Actor):
    """What somebody with the right to stop engines does."""

    def pause(
        self,
        *,
        mode: Any,
        clear_cache: bool = False,
        newcomers: Any = "hold",
        lease_s: float | None = None,
        pause_id: str | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        self.world.count_all(f"pause {mode}")
        self.start("pause", self._pause(mode, clear_cache, newcomers, lease_s, pause_id, timeout_s))

    async def _pause(
        self,
        mode: Any,
        clear_cache: bool,
        newcomers: Any,
        lease_s: float | None,
        pause_id: str | None,
        timeout_s: float,
    ) -> None:
        world, watch = self.world, self.world.watch
        started_s, before = world.loop.time(), self.model.live()
        num_pauses, num_resumes = watch.num_pauses + 1, watch.num_resumes
        try:
            report = await world.frontend.pause(
                mode,
                clear_cache=clear_cache,
                newcomers=newcomers,
                lease_s=lease_s,
                pause_id=pause_id,
                timeout_s=timeout_s,
            )
        except PauseTimeoutError as error:
            is_late = world.loop.time() >= started_s + timeout_s - 1e-9
            if not is_late or world.frontend.pause_state.state != "draining":
                world.violate("pause answer", f"{error}, {world.frontend.pause_state}")
        except PauseInterruptedError:
            if num_resumes == watch.num_resumes:
                world.violate("pause answer", "interrupted, and nobody resumed")
        except UtilityCallError as error:
            # An engine's own lease may end before its pause holds, and before the front end's.
            if lease_s is None:
                world.violate("pause answer", str(error))
        except EngineDeadError as error:
            if not (world.fleet.dead or world.is_shutting_down):
                world.violate("pause answer", str(error))
        else:
            world.trace.note(world.loop.time(), "paused", str(report))
            if mode == "abort" and (left := [str(one) for one in before if one.is_live]):
                world.violate("pause abort", f"{left} live on")
            watch.on_answer(report, num_pauses, num_resumes)
            if pause_id is not None and report.pause_id != pause_id:
                world.violate("pause answer", f"{report} of pause {pause_id!r}")
            if "timeout" in report.engines.values():
                world.violate("pause answer", f"{report} while engines have not answered")

    def resume(self, *, whose: str = "any", timeout_s: float = 5.0) -> None:
        self.world.count_all("resume")
        self.start("resume", self._resume(whose, timeout_s))

    async def _resume(self, whose: str, timeout_s: float) -> None:
        world, watch = self.world, self.world.watch
        state = world.frontend.pause_state
        pause_id = {"any": None, "newest": state.pause_id, "another": SOMEBODY_ELSE}[whose]
        is_conflict = watch.order is not None and pause_id not in (None, watch.order.pause_id)
        num_pauses, num_resumes = watch.num_pauses, watch.num_resumes + (not is_conflict)
        try:
            report = await watch.resume(pause_id, timeout_s)
        except PauseConflictError:
            if not is_conflict:
                world.violate("resume", f"{pause_id!r} was refused in state {state}")
            return
        if is_conflict or (report.was, report.pause_id) != (state.state, state.pause_id):
            world.violate("resume", f"{pause_id!r} ended {report} in state {state}")
        if report.num_released != state.num_held:
            world.violate("resume", f"{state.num_held} were held, and {report} released")
        if (num_pauses, num_resumes) == (watch.num_pauses, watch.num_resumes):
            for ledger in world.fleet.alive:
                is_told = report.engines.get(ledger.rank) == "ok"
                if is_told and ledger.pauses.state != "running":
                    world.violate("resume", f"engine {ledger.rank} is {ledger.pauses.state}")

    def flush(self, *, resets_running: bool) -> None:
        self.world.count_all("flush")
        self.start("flush", self._flush(resets_running))

    async def _flush(self, resets_running: bool) -> None:
        world = self.world
        try:
            is_flushed = await world.frontend.flush_cache(reset_running_requests=resets_running)
        except (EngineTimeoutError, EngineDeadError) as error:
            if not (world.had_faults or world.is_shutting_down):
                world.violate("flush", str(error))
            return
        if resets_running and not is_flushed:
            world.violate("flush", "it was refused, although requests may be recomputed")
