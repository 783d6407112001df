"""Bugs between the acceptance of a request and its end: names, places, dead engines, shutdowns."""

from __future__ import annotations

from scripts.mutations.mutation import Edit, Mutation

INTAKE = "frontend/requests/intake.py"
REGISTRY = "frontend/requests/registry.py"
DISPATCHER = "frontend/requests/dispatcher.py"
MAILBOX = "frontend/requests/mailbox.py"

MUTATIONS = (
    # -- acceptance ------------------------------------------------------------------------------
    Mutation(
        "dropped_while_tokenizing_runs",
        "A request that ended while its prompt was tokenized is sent to an engine.",
        Edit(
            INTAKE,
            """
            for entry, new in live:
                assert entry.place is not None
                entry.place.set_num_prompt_tokens(len(token_ids))
                self._prepare(entry, new, token_ids)
            for entry, _ in live:
                if entry.terminal is None:
                    self._dispatcher.send(entry)
            """,
            """
            for entry, new in siblings:
                if entry.place is not None:
                    entry.place.set_num_prompt_tokens(len(token_ids))
                self._prepare(entry, new, token_ids)
                self._dispatcher.send(entry)
            """,
        ),
        origin="SGLang #36333",
    ),
    Mutation(
        "refused_call_leaves_siblings",
        "A call whose second request is refused leaves its first one behind.",
        Edit(
            INTAKE,
            """
            for entry in accepted:
                self._dispatcher.take_back(entry)
            raise
            """,
            "raise",
        ),
    ),
    Mutation(
        "refused_call_keeps_its_place",
        "A refused call goes on counting among those that wait.",
        Edit(
            DISPATCHER,
            """
            entry.leave_queue()
            self.gate.forget(entry)
            if self.registry.remove_running(
            """,
            "if self.registry.remove_running(",
        ),
    ),
    Mutation(
        "aborted_request_keeps_its_place",
        "A request that ends before its first token goes on counting among those that wait.",
        Edit(
            DISPATCHER,
            """
            stage, entry.terminal = entry.stage, terminal
            entry.leave_queue()
            """,
            "stage, entry.terminal = entry.stage, terminal",
        ),
    ),
    Mutation(
        "live_id_given_again",
        "A live id that is given again is accepted, and its name leads to both requests.",
        Edit(
            REGISTRY,
            "if name in self._by_name:",
            "if name in self._entries:",
        ),
    ),
    Mutation(
        "batches_share_names",
        "Two batches may have one name: an abort of either ends both.",
        Edit(
            REGISTRY,
            "if any(holder.batch_id != entry.batch_id for holder in holders):",
            "if any(holder.batch_id is None for holder in holders):",
        ),
    ),
    Mutation(
        "request_lost_to_a_dead_engine",
        "A request whose engine turns out to be dead when it is sent goes nowhere.",
        Edit(
            DISPATCHER,
            """
            if self.registry.get(entry.internal_id) is None:
                return  # A sibling ended with that engine, and its call with the sibling.
            continue
            """,
            "return",
        ),
    ),
    # -- ends ------------------------------------------------------------------------------------
    Mutation(
        "two_terminals",
        "An engine's last word on a request that has ended here ends it again.",
        Edit(
            DISPATCHER,
            "entry = live(output.request_id)",
            """
            entry = live(output.request_id)
            if output.finish_reason is not None and entry is None:
                ending = self.registry.get_ending(output.request_id, rank)
                entry = None if ending is None else ending.entry
            """,
        ),
        Edit(
            DISPATCHER,
            """
            if not is_ours:
                return
            """,
            "",
        ),
        Edit(MAILBOX, 'assert self._terminal is None, "nothing may follow a terminal"', ""),
        Edit(MAILBOX, 'assert self._terminal is None, "a request has one terminal"', ""),
    ),
    Mutation(
        "finished_stays_in_flight",
        "A request that finished goes on counting as its engine's load.",
        Edit(REGISTRY, "self.num_in_flight[entry.engine_index] -= 1", "pass"),
        origin="AReaL: gateway counters leak on disconnect",
    ),
    Mutation(
        "confirmed_too_early",
        "A dropped request is taken for gone before its engine has said so.",
        Edit(
            REGISTRY,
            "self._ending[entry.internal_id] = Ending(entry, entry.engine_index, now, cause)",
            "self.num_in_flight[entry.engine_index] -= 1",
        ),
    ),
    # -- faults ----------------------------------------------------------------------------------
    Mutation(
        "one_death_ends_all",
        "An engine's death ends the requests of every engine.",
        Edit(
            DISPATCHER,
            """
            self.client.disconnect(rank, reason)
            entries = self.registry.select(lambda entry: entry.engine_index == rank)
            """,
            """
            self.client.disconnect(rank, reason)
            entries = self.registry.select(lambda entry: entry.engine_index is not None)
            """,
        ),
    ),
    Mutation(
        "death_leaves_endings",
        "Requests that were ending in an engine that died are ending for ever.",
        Edit(DISPATCHER, "self.registry.end_all_of(rank)", ""),
    ),
    Mutation(
        "death_loses_tokens",
        "Tokens that arrived together with the news of their engine's death are lost.",
        Edit(
            DISPATCHER,
            """
            self.on_turn_end()
            self.alive_engines.discard(rank)
            """,
            "self.alive_engines.discard(rank)",
        ),
    ),
    Mutation(
        "bad_frame_skipped",
        "A frame that cannot be decoded is logged, and its tokens are missing.",
        Edit(
            DISPATCHER,
            "for internal_id, cause in self.registry.forget_aborts(rank):",
            """
            return
            for internal_id, cause in self.registry.forget_aborts(rank):
            """,
        ),
    ),
    Mutation(
        "confirmation_lost_with_a_bad_frame",
        "A confirmation that was in a damaged frame is never asked for again.",
        Edit(
            DISPATCHER,
            """
            for internal_id, cause in self.registry.forget_aborts(rank):
                self._auto_aborts.push(internal_id, cause)
            """,
            "",
        ),
        origin="Caesura",
    ),
    Mutation(
        "shutdown_forgets_the_silent",
        "A shutdown leaves the requests of an engine that does not answer without an end.",
        Edit(
            "frontend/async_engine.py",
            "self._dispatcher.end_without_engine(list(self._dispatcher.registry), terminal)",
            "",
        ),
    ),
    Mutation(
        "engine_leaves_without_a_word",
        "An engine that is told to stop leaves its requests without an end.",
        Edit(
            "engine_core/process/step_loop.py",
            "self._send_all(self._core.abort_everything(self._clock()))",
            "",
        ),
    ),
)
