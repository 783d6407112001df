"""Bugs of resumes and leases, and of the gate that holds newcomers."""

from __future__ import annotations

from scripts.mutations.mutation import Edit, Mutation

GATE = "frontend/requests/pause_gate.py"
PAUSES = "frontend/requests/pauses.py"
DISPATCHER = "frontend/requests/dispatcher.py"
ENGINE_PAUSE = "engine_core/pause.py"

MUTATIONS = (
    Mutation(
        "still_rejecting",
        "Newcomers are refused after the resume of a pause that refused them.",
        Edit(
            GATE,
            "self.order: PauseOrder | None = None",
            """
            self.order: PauseOrder | None = None
            self._rejects_newcomers = False
            """,
        ),
        Edit(
            GATE,
            "self.order = order",
            """
            self.order = order
            self._rejects_newcomers = order.newcomers == "reject"
            """,
        ),
        Edit(
            GATE,
            'if self.order is not None and self.order.newcomers == "reject":',
            "if self._rejects_newcomers:",
        ),
        Edit(GATE, "(pause {self.order.pause_id!r})", "(pause {self.pause_id!r})"),
        origin="FastDeploy",
    ),
    Mutation(
        "released_in_reverse",
        "Held requests are sent newest first.",
        Edit(
            GATE,
            "released = [entry for entry, _ in self._held.values()]",
            "released = [entry for entry, _ in reversed(self._held.values())]",
        ),
    ),
    Mutation(
        "ended_while_held_is_sent",
        "A request that ended while it was held is sent at the resume.",
        Edit(
            DISPATCHER,
            """
            self.gate.forget(entry)
            if entry.deadline is not None:
            """,
            "if entry.deadline is not None:",
        ),
        Edit(
            DISPATCHER,
            """
            if entry.terminal is not None:
                continue  # It ended with an engine that died meanwhile.
            """,
            "",
        ),
    ),
    Mutation(
        "held_for_ever",
        "What is held when the last engine dies never ends.",
        Edit(
            DISPATCHER,
            """
            if not self.alive_engines:
                entries += self.gate.held
            """,
            "",
        ),
    ),
    Mutation(
        "held_past_its_limit",
        "A request is held for as long as a pause lasts.",
        Edit(
            PAUSES,
            """
            for entry in gate.expired(now):
                self._dispatcher.end_unsent(entry, terminal)
            """,
            "del terminal",
        ),
        origin="SGLang",
    ),
    Mutation(
        "lease_outlives_its_pause",
        "A resume does not end the lease, which ends a later pause that has none.",
        Edit(
            PAUSES,
            """
            self._cancel_timers()
            fan_out = FanOut({rank: self._resume_call(rank)
            """,
            "fan_out = FanOut({rank: self._resume_call(rank)",
        ),
        Edit(
            PAUSES,
            """
            if self._lease is not None:
                self._lease.cancel()
                self._lease = None
            if lease_s is not None:
            """,
            "if lease_s is not None:",
        ),
    ),
    Mutation(
        "engine_lease_outlives_its_pause",
        "An engine does not forget the lease of a pause that has ended.",
        Edit(ENGINE_PAUSE, "self._order = self.lease_ends_s = None", "self._order = None"),
        Edit(
            ENGINE_PAUSE,
            "self.lease_ends_s = None if order.lease_s is None else now + order.lease_s",
            """
            if order.lease_s is not None:
                self.lease_ends_s = now + order.lease_s
            """,
        ),
    ),
    Mutation(
        "anybody_resumes",
        "A resume that names another pause ends this one.",
        Edit(
            PAUSES,
            "if not gate.is_open and pause_id not in (None, gate.pause_id):",
            'if not gate.is_open and pause_id == "":',
        ),
    ),
)
