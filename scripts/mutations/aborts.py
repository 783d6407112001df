"""Bugs of explicit aborts, and of their receipts."""

from __future__ import annotations

from scripts.mutations.mutation import Edit, Mutation

ABORTS = "engine_core/aborts.py"
EXPLICIT = "frontend/requests/explicit_abort.py"
AUTO = "frontend/requests/auto_aborts.py"
REGISTRY = "frontend/requests/registry.py"
DISPATCHER = "frontend/requests/dispatcher.py"
DELIVERY = "frontend/requests/delivery.py"

MUTATIONS = (
    # -- effect before acknowledgement -----------------------------------------------------------
    Mutation(
        "acknowledged_before_free",
        "An abort is answered at once, and its requests give up their blocks with the next step.",
        Edit(
            ABORTS,
            "freed, cached = self._scheduler.remove(request)",
            """
            freed, cached = len(request.block_ids), 0
            self._scheduler.leaving.append(request)
            """,
        ),
        Edit(
            "engine_core/scheduler.py",
            "self._left_slots: list[int] = []",
            """
            self._left_slots: list[int] = []
            self.leaving: list[Request] = []
            """,
        ),
        Edit(
            "engine_core/scheduler.py",
            "batch = StepBatch()",
            """
            for request in self.leaving:
                self.remove(request)
            self.leaving.clear()
            batch = StepBatch()
            """,
        ),
        origin="vLLM, SGLang; FastDeploy #7615",
    ),
    Mutation(
        "receipt_before_terminals",
        "A receipt overtakes the terminals that it reports.",
        Edit("engine_core/outbox.py", "self._flush()", ""),
    ),
    Mutation(
        "finished_told_as_aborted",
        "A request that finished while its abort was under way is told as aborted.",
        Edit(
            EXPLICIT,
            'elif entry.terminal.finish_reason == "abort":',
            "elif entry.abort_cause is not None:",
        ),
    ),
    Mutation(
        "cause_lost",
        "A terminal does not say why its request was aborted.",
        Edit(
            DELIVERY,
            "engine_terminal(output, reason, entry.abort_cause)",
            "engine_terminal(output, reason, None)",
        ),
    ),
    # -- aim -------------------------------------------------------------------------------------
    Mutation(
        "match_by_prefix",
        "An abort of job-1 ends job-10 too.",
        Edit(
            REGISTRY,
            "return {name: list(self._by_name.get(name, {}).values()) for name in names}",
            """
            return {
                name: self.select(lambda entry: any(own.startswith(name) for own in entry.names))
                for name in names
            }
            """,
        ),
        origin="SGLang #30912",
    ),
    Mutation(
        "suffix_cut_from_ids",
        "An abort of one child ends its siblings: the index is cut from ids.",
        Edit(
            REGISTRY,
            "list(self._by_name.get(name, {}).values())",
            'list(self._by_name.get(name.partition(".")[0], {}).values())',
        ),
        origin="FastDeploy #5320",
    ),
    Mutation(
        "engine_knows_callers_ids",
        "Engines get the caller's ids: the abort of a dropped request kills its successor.",
        Edit(
            "frontend/requests/intake.py",
            'internal_id=f"{request_id}-{suffix}"',
            "internal_id=request_id",
        ),
        origin="vLLM",
    ),
    Mutation(
        "frame_to_another_engine",
        "Every ABORT frame goes to the first engine.",
        Edit(
            AUTO, "self._send(engine_index, encode_abort(ids))", "self._send(0, encode_abort(ids))"
        ),
    ),
    Mutation(
        "one_engine_called",
        "An abort over several engines reaches the first of them only.",
        Edit(
            EXPLICIT,
            "for engine_index, entries in by_engine.items():",
            "for engine_index, entries in list(by_engine.items())[:1]:",
        ),
    ),
    # -- any stage -------------------------------------------------------------------------------
    Mutation(
        "lost_before_dispatch",
        "An abort of a request that no engine has seen is answered, and lost.",
        Edit(
            EXPLICIT,
            'self._dispatcher.end_unsent(entry, Terminal("abort", abort_cause=cause))',
            "",
        ),
        origin="SGLang #30912",
    ),
    Mutation(
        "abort_all_skips_unsent",
        "Abort-all ends what engines have, and forgets requests that are tokenizing or held.",
        Edit(
            EXPLICIT,
            "registry.select(lambda entry: True)",
            "registry.select(lambda entry: entry.engine_index is not None)",
        ),
        origin="SGLang #30912",
    ),
    Mutation(
        "second_abort_swallowed",
        "A request that was aborted once takes no further abort.",
        Edit(
            EXPLICIT,
            """
            if entry.abort_cause is None:
                entry.abort_cause, entry.abort_started_s = cause, self._dispatcher.clock()
            """,
            """
            if entry.abort_cause is not None:
                receipt.requests[entry.request_id] = AbortedRequest("pending")
                continue
            entry.abort_cause, entry.abort_started_s = cause, self._dispatcher.clock()
            """,
        ),
        origin="SGLang 0.5.23",
    ),
    Mutation(
        "late_terminal_is_a_key_error",
        "A terminal of a request that is gone here is an error that nobody expects.",
        Edit(
            DISPATCHER,
            "entry = live(output.request_id)",
            "entry = self.registry._entries[output.request_id]",
        ),
        origin="SGLang #28341",
    ),
    Mutation(
        "stop_string_lost_in_a_race",
        "A stop string that arrives together with an abort's terminal is overlooked.",
        Edit(
            DELIVERY,
            "if stop_string is None:",
            "if stop_string is None or reason is FinishReason.ABORT:",
        ),
    ),
)
