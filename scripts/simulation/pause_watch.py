"""The front end's pauses as its operators see them: when they begin, hold and end.

Hears of the beginning of every pause and of every resume, by whoever: an operator, a weight update,
the end of a lease.

Checks
- `stillness`: once a pause was answered, no stream gets a token before a resume.
- `handed over`: at the answer every token of every engine is with its stream.
- `pause state`: state, id, mode and readiness are what the calls so far make them; a lease ends
  when it should.
- `pause abort`: when a pause of mode abort holds, everything accepted before it has ended.
- `held`: nothing is sent while the gate is closed, and then in order of acceptance; nobody is held
  for longer than the limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from frontend.outputs import AbortCause
from frontend.requests import pause_gate
from frontend.requests.explicit_abort import PendingAbort, Selector
from frontend.requests.fan_out import FanOut
from frontend.requests.pause_gate import MAX_HOLD_S, PauseOrder
from frontend.requests.pause_reports import PauseReport, ResumeReport
from frontend.requests.pauses import Pauses, _Attempt
from frontend.requests.registry import Entry
from ipc.output import EngineCoreOutputs
from scripts.simulation.model_request import ModelRequest

if TYPE_CHECKING:
    from scripts.simulation.world import World

HOLD_SLACK_S = 1.0
UPDATE_PAUSE = "weight-update-"
"""So begins the id of an update's own pause."""


class PauseWatch:
    """Looks at the pauses of one front end."""

    def __init__(self, world: World, pauses: Pauses) -> None:
        self._world = world
        self._start, self._start_resume = pauses._start, pauses._start_resume
        pauses._start = self._on_pause  # type: ignore[method-assign]
        pauses._start_resume = self._on_resume  # type: ignore[method-assign]
        aborts = world.frontend._aborts
        self._start_abort = aborts.start
        aborts.start = self._on_abort  # type: ignore[method-assign]
        self.order: PauseOrder | None = None
        """Of the newest pause."""
        self.lease_ends_s: float | None = None
        self.num_pauses = 0
        self.num_resumes = 0
        self.num_lease_ends = 0
        self._holds = False
        """The newest pause was answered."""
        self._is_operator = False
        """Who resumes now."""
        self._last_change_s = 0.0
        self._doomed: list[ModelRequest] = []
        """Whom the last pause of mode abort must end."""

    async def resume(self, pause_id: str | None = None, timeout_s: float = 5.0) -> ResumeReport:
        """An operator does, and no weight update."""
        self._is_operator = True
        try:
            return await self._world.frontend.resume(pause_id, timeout_s=timeout_s)
        finally:
            self._is_operator = False

    # -- what is heard -------------------------------------------------------------------------

    def _on_pause(self, order: PauseOrder) -> _Attempt:
        world = self._world
        if order.mode == "abort":
            self._doomed = world.model.live()
            for request in self._doomed:
                request.allowed_causes.add(AbortCause.PAUSE)
        if self.order is not None and order.pause_id.startswith(UPDATE_PAUSE):
            world.violate("update", f"{order} took the place of {self.order}")
        self._last_change_s = world.loop.time()
        self.num_pauses += 1
        self._holds = False
        self.order = order
        self.lease_ends_s = None
        if order.lease_s is not None:
            self.lease_ends_s = world.loop.time() + order.lease_s
        world.trace.note(world.loop.time(), "pause", order.mode, order.pause_id)
        return self._start(order)

    def _on_abort(self, selector: Selector, cause: AbortCause) -> PendingAbort:
        """An update of mode abort ends what an earlier pause holds."""
        if cause is AbortCause.PAUSE:
            for request in self._world.model.live():
                request.allowed_causes.add(cause)
        return self._start_abort(selector, cause)

    def _on_resume(self, why: str) -> tuple[ResumeReport, FanOut]:
        world = self._world
        now = world.loop.time()
        world.trace.note(now, "resume", why)
        is_operator, self._is_operator = self._is_operator, False
        is_own = self.order is None or self.order.pause_id.startswith(UPDATE_PAUSE)
        if why == "as asked" and not (is_operator or is_own):
            world.violate("update", f"an update ended {self.order}")
        if why != "as asked":
            self.num_lease_ends += 1
            if self.lease_ends_s is None or now < self.lease_ends_s - 1e-9:
                world.violate("pause state", f"a lease ended at {now}, not {self.lease_ends_s}")
            world.count_all("lease end")
        if world.frontend.pause_state.state == "paused":
            self._check_doomed()
        self._last_change_s = now
        self.num_resumes += 1
        self._holds = False
        self.order = self.lease_ends_s = None
        return self._start_resume(why)

    def _check_doomed(self) -> None:
        """A pause of mode abort holds, or did."""
        if left := [str(one) for one in self._doomed if one.is_live]:
            self._world.violate("pause abort", f"{left} live on")
        self._doomed = []

    def on_answer(self, report: PauseReport, num_pauses: int, num_resumes: int) -> None:
        """A pause was answered; so many had begun when it did, itself included."""
        world = self._world
        if num_pauses == self.num_pauses:  # Else the newest may hold later.
            self._check_doomed()
        if num_pauses != self.num_pauses or num_resumes != self.num_resumes:
            return
        if self.lease_ends_s is not None and world.loop.time() >= self.lease_ends_s:
            return  # Engines end it themselves, before or after the front end.
        self._holds = True
        for ledger in world.fleet.alive:
            if ledger.pauses.state != "paused":
                world.violate("stillness", f"engine {ledger.rank} is {ledger.pauses.state}")
        num_kept = sum(ledger.pauses.num_kept for ledger in world.fleet.alive)
        if report.num_kept != num_kept and not world.fleet.dead:
            world.violate("pause receipt", f"{num_kept} are kept, and told was {report}")
        for request in world.model.live():
            entry = request.entry
            sampled = len(world.fleet.sampled(entry))
            if entry.num_output_tokens != sampled and entry.engine_index not in world.fleet.dead:
                world.violate("handed over", f"{request}: {sampled} tokens were sampled")

    def on_outputs(self, outputs: EngineCoreOutputs) -> None:
        """An engine's frame arrived."""
        if not self._holds:
            return
        if self.lease_ends_s is not None and self._world.loop.time() >= self.lease_ends_s:
            return
        for row in outputs.outputs:
            if row.new_token_ids and self._world.dispatcher.registry.get(row.request_id):
                self._world.violate("stillness", f"{row.request_id} got tokens while paused")

    def on_sent(self, entry: Entry) -> None:
        """A request has left for an engine."""
        world = self._world
        if self.order is not None:
            world.violate("held", f"{entry.internal_id} was sent while the gate is closed")
        request = world.model.by_entry.get(entry)
        if request is None or request.held_s is None:
            return
        self.check_hold(request)
        for other in world.model.live():
            if other.number >= request.number:
                return
            if other.held_s is not None and other.entry.engine_index is None:
                world.violate("held", f"{request} was released before {other}")

    def may_refuse(self, request: ModelRequest) -> bool:
        """Whether it has been held for as long as anybody may be, or finds too many before it."""
        if (
            request.held_s is None
            and len(self._world.dispatcher.gate) >= pause_gate.MAX_NUM_HELD - 2
        ):
            return True  # A long prompt, and up to two siblings.
        since_s = request.entry.accepted_s
        return self._world.clock() >= since_s + MAX_HOLD_S - 1e-6

    def on_commit(self) -> None:
        """A weight update is about to take effect."""
        world = self._world
        is_changing = world.loop.time() == self._last_change_s or not world.departures.is_punctual
        state = world.frontend.pause_state.state
        if state != "paused" and not is_changing:
            world.violate("update", f"it takes effect while engines are {state}")

    def check_updated(self) -> None:
        """An update has ended, and none is under way."""
        if self.order is not None and self.order.pause_id.startswith(UPDATE_PAUSE):
            self._world.violate("update", f"it left {self.order}")

    def check_hold(self, request: ModelRequest) -> None:
        """A request that was held is so no longer."""
        assert request.held_s is not None
        held_s = self._world.loop.time() - request.held_s
        if held_s > MAX_HOLD_S + HOLD_SLACK_S and self._world.departures.is_punctual:
            self._world.violate("held", f"{request} was held for {held_s} s")

    # -- what is looked at ---------------------------------------------------------------------

    def look(self) -> None:
        """State and readiness answer at once, and rightly."""
        frontend, order = self._world.frontend, self.order
        state = frontend.pause_state
        is_running = order is None
        told = (state.state == "running", state.mode, state.pause_id, state.newcomers)
        expected = (
            is_running,
            None if order is None else order.mode,
            None if order is None else order.pause_id,
            None if order is None else order.newcomers,
        )
        if told != expected:
            self._world.violate("pause state", f"it is {told}, not {expected}")
        if self._holds and state.state != "paused":
            self._world.violate("pause state", f"a pause was answered, and it is {state.state}")
        if frontend.is_ready != (is_running and bool(frontend.alive_engines)):
            self._world.violate("pause state", f"it says that it is ready: {frontend.is_ready}")
        left_s = self._lease_left_s()
        if (left_s is None) != (state.lease_left_s is None) or (
            left_s is not None and abs(left_s - (state.lease_left_s or 0.0)) > 1e-6
        ):
            self._world.violate(
                "pause state", f"the lease lasts {state.lease_left_s}, not {left_s}"
            )
        num_held = sum(
            one.entry.engine_index is None and bool(one.entry.add_frames)
            for one in self._world.model.live()
        )
        if num_held and not self._world.dispatcher.alive_engines:
            self._world.violate("held", f"{num_held} are held, and no engine lives")
        if state.num_held != num_held:
            self._world.violate("pause state", f"{state.num_held} are held, not {num_held}")

    def _lease_left_s(self) -> float | None:
        if self.lease_ends_s is None:
            return None
        return max(0.0, self.lease_ends_s - self._world.loop.time())
