"""Bugs of weight updates: what they change, when, on which engines, and who is told."""

from __future__ import annotations

from scripts.mutations.mutation import Edit, Mutation

SCHEDULER = "engine_core/scheduler.py"
ENGINE = "engine_core/weight_updates.py"
UPDATES = "frontend/weights/updates.py"
DISPATCHER = "frontend/requests/dispatcher.py"

MUTATIONS = (
    # -- the prefix cache ------------------------------------------------------------------------
    Mutation(
        "stale_prefixes",
        "Cached prefixes of the old weights are used under the new ones.",
        Edit(SCHEDULER, "self.weight_epoch += 1", ""),
        origin="lmdeploy #4917; NeMo-RL #4018",
    ),
    Mutation(
        "published_after_crossing",
        "A request that crossed an update publishes KV of both weights.",
        Edit(SCHEDULER, "request.is_of_one_epoch = False", "pass"),
        Edit(SCHEDULER, "self.running.publishes_at[:] = NEVER", "pass"),
    ),
    Mutation(
        "queued_with_old_hashes",
        "A request that was queued during an update looks for prefixes of the old weights.",
        Edit(
            SCHEDULER,
            """
            for request in (*self.waiting, *self.held):
                request.block_hashes.clear()
            """,
            "",
        ),
    ),
    Mutation(
        "recomputed_with_old_hashes",
        "A request that is recomputed after an update finds its KV of the old weights.",
        Edit(
            SCHEDULER,
            """
            request.block_hashes.clear()
            request.prompt_logprobs.clear()
            """,
            "request.prompt_logprobs.clear()",
        ),
    ),
    # -- what takes effect -----------------------------------------------------------------------
    Mutation(
        "label_without_weights",
        "An update sets its label, and the old weights serve on.",
        Edit(ENGINE, "self._runner.commit(update.staged)", ""),
    ),
    Mutation(
        "weights_without_label",
        "An update takes effect under the old label.",
        Edit(ENGINE, "self.version = label", "pass"),
    ),
    Mutation(
        "staged_in_place",
        "What is being staged serves at once, also if the update fails.",
        Edit(
            ENGINE,
            "update.loaded = self._runner.stage(source, update.loaded)",
            """
            update.loaded = self._runner.stage(source, update.loaded)
            self._runner.commit(update.loaded)
            """,
        ),
        origin="SGLang",
    ),
    Mutation(
        "half_committed",
        "An update that one engine could not stage takes effect on the others.",
        Edit(
            "frontend/weights/update.py",
            'answers = fan_out.answers("the staging of weights")',
            'answers = fan_out.results or fan_out.answers("the staging of weights")',
        ),
        origin="tokenspeed #672",
    ),
    Mutation(
        "committed_on_one_engine",
        "An update takes effect on the first engine only.",
        Edit(
            UPDATES,
            "fan_out = self._call(CAESURA_COMMIT_WEIGHTS, update.update_id, update.version)",
            """
            dispatcher, arguments = self._dispatcher, (update.update_id, update.version)
            first = sorted(dispatcher.alive_engines)[:1]
            fan_out = FanOut.start(dispatcher.client, first, CAESURA_COMMIT_WEIGHTS, *arguments)
            """,
        ),
    ),
    Mutation(
        "goes_on_without_a_part",
        "Of an update in parts, those behind one that failed take effect without it.",
        Edit(
            UPDATES,
            """
            if update.is_session:
                update.phase = "failed"
                self._update = update
            """,
            "",
        ),
        origin="Caesura",
    ),
    Mutation(
        "discard_not_sent",
        "Engines keep what a failed update has staged, and take no other.",
        Edit(
            UPDATES,
            "return self._call(CAESURA_DISCARD_WEIGHTS, update.update_id)",
            "return FanOut({})",
        ),
    ),
    # -- and its pause ---------------------------------------------------------------------------
    Mutation(
        "commit_before_the_pause",
        "An update takes effect without a pause.",
        Edit(
            UPDATES,
            """
            if was_running:
                await self._pauses.pause(order, max(timeout_s, 1.0))
            """,
            """
            if was_running:
                pass
            elif was_running:
                await self._pauses.pause(order, max(timeout_s, 1.0))
            """,
        ),
        origin="SGLang #22754",
    ),
    Mutation(
        "failed_update_leaves_a_pause",
        "An update that fails leaves the engines paused.",
        Edit(UPDATES, "await self._resume(order.pause_id)", "pass"),
        Edit(
            UPDATES,
            'self._dispatcher.metrics.on_weight_update("committed")',
            """
            if was_running:
                await self._resume(order.pause_id)
            """,
        ),
        origin="AReaL #1160",
    ),
    Mutation(
        "update_ends_another_pause",
        "An update while paused resumes the engines.",
        Edit(UPDATES, 'self._pauses.state.state == "running"', "True"),
    ),
    # -- labels ----------------------------------------------------------------------------------
    Mutation(
        "label_of_the_end",
        "All tokens of a request get the label of the weights at its end.",
        Edit(
            DISPATCHER,
            "entry.weight_marks.append((num_tokens, version))",
            "entry.weight_marks[:] = [(0, version)]",
        ),
        origin="AReaL #1569; verl",
    ),
    Mutation(
        "label_of_the_delivery",
        "Tokens that had arrived, but not become text, get the label of the next weights.",
        Edit(
            DISPATCHER,
            "num_tokens = entry.num_output_tokens + len(entry.unprocessed)",
            "num_tokens = entry.num_output_tokens",
        ),
    ),
    Mutation(
        "label_a_step_late",
        "The first tokens under new weights get the old label.",
        Edit(
            DISPATCHER,
            """
            if version is not None and version != self.weight_versions.get(rank):
                self.note_weight_version(rank, version)
            """,
            "",
        ),
        Edit(
            DISPATCHER,
            "for internal_id in outputs.finished_requests or ():",
            """
            if version is not None and version != self.weight_versions.get(rank):
                self.note_weight_version(rank, version)
            for internal_id in outputs.finished_requests or ():
            """,
        ),
    ),
    Mutation(
        "label_aborts_everything",
        "A change of the label aborts all requests.",
        Edit(
            "frontend/weights/controls.py",
            'calls = self._call("set_weight_version", version)',
            """
            await self.abort(abort_all=True)
            calls = self._call("set_weight_version", version)
            """,
        ),
        origin="SGLang; miles #2589",
    ),
)
