"""Bugs of pauses: what they stop, what becomes of it, and when they are answered."""

from __future__ import annotations

from scripts.mutations.mutation import Edit, Mutation

PAUSES = "frontend/requests/pauses.py"
DISPATCHER = "frontend/requests/dispatcher.py"
ENGINE_PAUSE = "engine_core/pause.py"
SCHEDULER = "engine_core/scheduler.py"

MUTATIONS = (
    # -- what a pause stops ----------------------------------------------------------------------
    Mutation(
        "straggler_of_an_abort_pause",
        "A pause that aborts forgets requests which are tokenizing or held.",
        Edit(PAUSES, "unsent.append(entry)", "pass"),
        origin="SGLang #30912",
    ),
    Mutation(
        "keep_then_abort",
        "A pause that aborts does nothing to what an earlier one holds.",
        Edit(
            "engine_core/core.py",
            'self.aborts.everything(outbox) if order.mode == "abort" else []',
            """
            (
                self.aborts.everything(outbox)
                if order.mode == "abort" and self.pauses.state == "running"
                else []
            )
            """,
        ),
        origin="SGLang: in_place, then abort",
    ),
    Mutation(
        "abort_waits_for_the_resume",
        "A paused engine does not answer aborts.",
        Edit(
            "engine_core/utilities.py",
            "def _abort(self, caller: Caller, request_ids: object, cause: object) -> object:",
            """
            def _abort(self, caller: Caller, request_ids: object, cause: object) -> object:
                if self._core.pauses.state == "paused":
                    return LATER
            """,
        ),
        origin="FastDeploy #7753",
    ),
    Mutation(
        "one_more_step",
        "A paused engine runs the step that it was about to begin.",
        Edit(
            "engine_core/process/step_loop.py",
            "items = self._intake.drain(",
            """
            had_work = self._core.has_work
            items = self._intake.drain(
            """,
        ),
        Edit(
            "engine_core/process/step_loop.py",
            """
            if self._core.has_work:
                self._send_all(
            """,
            """
            if self._core.has_work or had_work:
                self._send_all(
            """,
        ),
        origin="SGLang #22620; vLLM #52914",
    ),
    Mutation(
        "wait_begins_the_queued",
        "A pause that waits lets queued requests begin while it drains.",
        Edit(
            SCHEDULER,
            """
            for request in [one for one in self.waiting if one.stage is Stage.WAITING]:
                self.waiting.remove(request)
                self.held.push(request)
            """,
            "",
        ),
    ),
    Mutation(
        "newcomers_begin_in_a_drain",
        "Newcomers are sent and begin while a pause drains.",
        Edit(
            DISPATCHER,
            "if not self.gate.is_open and self.alive_engines:",
            'if self.gate.state == "paused" and self.alive_engines:',
        ),
        Edit(
            SCHEDULER,
            "(self.held if self._holds_newcomers else self.waiting).push(request)",
            "self.waiting.push(request)",
        ),
        origin="verl #7511",
    ),
    Mutation(
        "keep_forgets_what_runs",
        "A pause that keeps requests takes them out of the batch, and their blocks leak.",
        Edit(
            ENGINE_PAUSE,
            "self._scheduler.hold_newcomers()",
            """
            self._scheduler.hold_newcomers()
            if order.mode == "keep":
                while self._scheduler.running:
                    self._scheduler.running.pop()
            """,
        ),
        origin="SGLang #21705",
    ),
    # -- retracting ------------------------------------------------------------------------------
    Mutation(
        "retract_keeps_blocks",
        "A pause that retracts only freezes requests with their KV.",
        Edit(
            ENGINE_PAUSE,
            'if order.mode == "retract" or (order.mode == "keep" and order.clear_cache):',
            'if order.mode == "keep" and order.clear_cache:',
        ),
    ),
    Mutation(
        "retract_loses_tokens",
        "A retracted request begins again at its prompt.",
        Edit(
            SCHEDULER,
            "num_requests = len(self.running)",
            """
            num_requests = len(self.running)
            for request in self.running:
                del request.token_ids[request.num_prompt_tokens :]
            """,
        ),
        origin="SGLang #11673",
    ),
    Mutation(
        "retracted_to_the_tail",
        "Retracted requests wait behind those that have not begun.",
        Edit(
            SCHEDULER,
            """
            self.waiting.push(request)
            request.num_preemptions += 1
            """,
            """
            request.order = (request.order[0], request.order[1] + 1_000_000)
            self.waiting.push(request)
            request.num_preemptions += 1
            """,
        ),
        origin="SGLang",
    ),
    Mutation(
        "clear_cache_forgotten",
        "A pause that was to empty the prefix cache does not.",
        Edit(
            ENGINE_PAUSE,
            """
            if self._clears_cache:
                self._scheduler.pool.flush()
            """,
            "",
        ),
    ),
    Mutation(
        "overtaken_pause_keeps_its_cache",
        "A pause that another overtakes is answered, and its cache is not empty.",
        Edit(
            ENGINE_PAUSE,
            "order.clear_cache or (bool(self._waiters) and self._clears_cache)",
            "order.clear_cache",
        ),
        origin="Caesura",
    ),
    Mutation(
        "flush_refused_while_retracted",
        "The prefix cache cannot be flushed while retracted requests wait, which hold nothing.",
        Edit(
            "engine_core/utilities.py",
            "if scheduler.running:",
            "if scheduler.running or scheduler.num_waiting:",
        ),
        origin="SGLang #33783",
    ),
    # -- when it is answered ---------------------------------------------------------------------
    Mutation(
        "answered_while_draining",
        "A pause that waits is answered while requests run.",
        Edit(
            ENGINE_PAUSE,
            """
            if self._order.mode == "wait" and self._scheduler.has_work:
                return
            """,
            "",
        ),
        origin="SGLang #22620",
    ),
    Mutation(
        "first_engine_answers_for_all",
        "The state is paused as soon as one of several engines stands still.",
        Edit(PAUSES, "or attempt.fan_out.unanswered or", "or"),
    ),
    Mutation(
        "timed_out_is_paused",
        "A pause that was not answered in time is taken for one that holds.",
        Edit(
            PAUSES,
            "assert self._newest is not None\n",
            """
            assert self._newest is not None
            self._gate.settle(self._dispatcher.clock())
            """,
        ),
    ),
    Mutation(
        "drain_misses_aborts",
        "A drain counts the requests that finish, but not those that are aborted, and never ends.",
        Edit(ENGINE_PAUSE, "self.since_s = 0.0", "self.since_s, self.num_left = 0.0, 0"),
        Edit(
            ENGINE_PAUSE,
            'self._enter("draining", now)',
            """
            self._enter("draining", now)
            self.num_left = len(self._scheduler.running) + len(self._scheduler.waiting)
            """,
        ),
        Edit(
            "engine_core/core.py",
            "outbox.confirm_end(request.client_index, request.request_id)",
            """
            self.pauses.num_left -= 1
            outbox.confirm_end(request.client_index, request.request_id)
            """,
        ),
        Edit(
            ENGINE_PAUSE,
            'if self._order.mode == "wait" and self._scheduler.has_work:',
            'if self._order.mode == "wait" and self.num_left > 0:',
        ),
        origin="FastDeploy #7825",
    ),
    Mutation(
        "stale_abort_marker",
        "A drain waits for an abort that came too late to end anything.",
        Edit(
            "engine_core/aborts.py",
            "if request is None:\n    outbox.confirm_end(client_index, request_id)",
            """
            if request is None:
                self._scheduler.stale_aborts.add(request_id)
                outbox.confirm_end(client_index, request_id)
            """,
        ),
        Edit(
            SCHEDULER,
            "self._left_slots: list[int] = []",
            """
            self._left_slots: list[int] = []
            self.stale_aborts: set[str] = set()
            """,
        ),
        Edit(
            ENGINE_PAUSE,
            'if self._order.mode == "wait" and self._scheduler.has_work:',
            """
            if self._order.mode == "wait" and (
                self._scheduler.has_work or self._scheduler.stale_aborts
            ):
            """,
        ),
        origin="FastDeploy #7825",
    ),
    Mutation(
        "second_pause_unanswered",
        "A pause of an engine that is paused already is never answered.",
        Edit(
            ENGINE_PAUSE,
            'self._enter("draining", now)',
            """
            if self.state == "running":
                self._enter("draining", now)
            """,
        ),
        origin="SGLang: in_place, then abort",
    ),
    Mutation(
        "pause_without_engines",
        "A pause waits for its whole time-out when no engine is left to answer.",
        Edit(
            PAUSES,
            """
            if not self._dispatcher.alive_engines:
                raise EngineDeadError("no engine is alive; restart the server")
            """,
            "",
        ),
        origin="Caesura",
    ),
)
